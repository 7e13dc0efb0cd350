"""Example comparisons: the one on the WorldPM model card, and one for each category that parity reports break down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.conversations.conversation import ChatMessage
from runtime.evaluation.golden import GOLDEN_CONVERSATIONS


@dataclass(frozen=True)
class Example:
    """The turns before the response and two responses; the better one is not always A."""

    name: str
    turns: list[ChatMessage]
    response_a: str
    response_b: str


def _read() -> dict[str, Example]:
    good, bad = GOLDEN_CONVERSATIONS
    model_card = Example("Better sleep (model card)", good[:-1], good[-1]["content"], bad[-1]["content"])
    rows = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    ours = [Example(f"{row['name']} ({row['area']})", row["turns"], row["a"], row["b"]) for row in rows]
    return {example.name: example for example in (model_card, *ours)}


EXAMPLES = _read()
