"""Comparisons to begin with: the model card's, and a short one of our own for each area that reports break down by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from runtime.conversation import Message
from runtime.golden import CONVERSATIONS


@dataclass(frozen=True)
class Example:
    """Turns before the response, and two responses; the better one is not always A."""

    name: str
    turns: list[Message]
    response_a: str
    response_b: str


def _read() -> dict[str, Example]:
    good, bad = CONVERSATIONS
    card = Example("Better sleep (model card)", good[:-1], good[-1]["content"], bad[-1]["content"])
    rows = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    ours = [Example(f"{row['name']} ({row['area']})", row["turns"], row["a"], row["b"]) for row in rows]
    return {example.name: example for example in (card, *ours)}


EXAMPLES = _read()
