"""Pairs that a variant is measured on share no prompt with those that heads are trained and test beds calibrated on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.variants import draw_pairs, training_rows
from runtime.conversations.rendering import Renderer
from tests.helpers.tiny_job import write_pairs


def test_measured_and_calibrated_prompts_are_disjoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl", 200)
    measured = draw_pairs(str(tiny_checkpoint), source, count=20, max_tokens=1024)
    renderer = Renderer.from_directory(tiny_checkpoint, 1024)
    calibrated = {
        tuple(renderer.render([*row["prompt"], *row[side]]).token_ids)
        for row in training_rows(source)
        for side in ("chosen", "rejected")
    }
    assert len(measured) == 40 and len(calibrated) > 300
    assert not calibrated & {tuple(row.token_ids) for row in measured}
