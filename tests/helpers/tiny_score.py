"""Rows of every kind for the tiny model, and the scoring command in-process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from runtime.score import main

_WORDS = ("the", "and", "thing", "story", "answer", "counts", "sleep", "early", "Straße", "北", "seven")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def mixed_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs, sets of responses, single conversations, and every seventh row broken."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(1, 12)))

    rows = []
    for number in range(count):
        row: dict[str, Any] = {"id": f"r{number}", "category": ("short", "long/er")[number % 2]}
        if number % 7 == 3:
            row["messages"] = [user(text())]
        elif number % 3 == 0:
            row |= {"prompt": text(), "chosen": text(), "rejected": text()}
        elif number % 3 == 1:
            row |= {"prompt": [user(text())], "responses": [text() for _ in range(draw.randint(1, 4))]}
        else:
            row["messages"] = [user(text()), assistant(text())]
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Rows that are text already stand as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def score(model: Path, rows: Path | str, *more: str | Path, budget: int = 16) -> int:
    """Run the command with windows of a few rows; its exit status."""
    common = ["--model", model, "--devices", "cpu", "--dtype", "float32", "--token-budget", budget]
    return main([str(rows), *map(str, common), *map(str, more)])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
