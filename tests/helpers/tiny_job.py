"""Quantize a tiny checkpoint in a second or two: model, preference pairs, and the command in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from quantize.run import main
from runtime.common.files import sha256_of
from tests.helpers.tiny import write_tiny_checkpoint

ROWS, PAIRS = 12, 10
_WORDS = ("the", "and", "thing", "story", "answer", "counts", "sleep", "early", "north", "river", "seven")


def write_pairs(path: Path, count: int = 40, seed: int = 0, words: int = 24) -> Path:
    """Write `count` preference pairs with different prompts as JSONL, with up to `words` words per turn."""
    draw = random.Random(seed)

    def text(lead: str) -> str:
        return " ".join([lead, *(draw.choice(_WORDS) for _ in range(draw.randint(3, words)))])

    rows = [
        {
            "prompt": [{"role": "user", "content": text(f"question {number}")}],
            "chosen": [{"role": "assistant", "content": text("chosen")}],
            "rejected": [{"role": "assistant", "content": text("rejected")}],
            "category": ("objective", "adversarial", "subjective")[number % 3],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_job_model(directory: Path, *, layers: int = 3, shards: int = 2, **shape: Any) -> Path:
    """Write a tiny checkpoint whose widths are multiples of 128, the default group size."""
    shape = {"hidden": 128, "intermediate": 256} | shape
    return write_tiny_checkpoint(directory, layers=layers, shards=shards, **shape)


def arguments(model: Path, pairs: Path, output: Path, *more: str) -> list[str]:
    """The command line of a small run; flags in `more` override the defaults here."""
    common = ["--model", model, "--calibration", pairs, "--output", output, "--rows", ROWS, "--parity-pairs", PAIRS]
    return [*map(str, common), "--device", "cpu", "--dtype", "float32", "--token-budget", "256", *more]


def quantize(model: Path, pairs: Path, output: Path, *more: str) -> int:
    """Run the command and return its exit status."""
    return main(arguments(model, pairs, output, *more))


def digests(output: Path) -> dict[str, str]:
    """sha256 of every file outside `job/`, by relative path."""
    files = (file for file in sorted(output.rglob("*")) if file.is_file())
    named = {file.relative_to(output).as_posix(): file for file in files}
    return {name: sha256_of(file) for name, file in named.items() if not name.startswith("job/")}
