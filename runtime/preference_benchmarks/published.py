"""The accuracies that the WorldPM paper prints for its fine-tuned models (published.json)."""

from __future__ import annotations

import json
from pathlib import Path

_PAPER = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, dict[str, dict[str, float]]] = _PAPER["accuracy"]
"""Percent by model, benchmark and section."""


def published_accuracy(model: str | None, benchmark: str) -> dict[str, float]:
    """The published share (0 to 1) by section; empty if there is none.

    Args:
        model: the published name of a WorldPM model.
        benchmark: name of a benchmark.
    """
    sections = PUBLISHED.get(model or "", {}).get(benchmark, {})
    return {section: round(percent / 100, 4) for section, percent in sections.items()}
