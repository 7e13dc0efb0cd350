"""What a person sees while blocks are quantized."""

from __future__ import annotations

import io

from rich.console import Console

from quantize.job.progress import BlockProgress
from runtime.common.terminal import progress_line


def watched(terminal: bool) -> str:
    """What appears while two of four blocks are quantized after a resumption."""
    file = io.StringIO()
    with BlockProgress(4, 1, Console(file=file, force_terminal=terminal, width=120)) as progress:
        progress.linear_started("self_attn.q_proj", None)
        progress.linear_started("mlp.down_proj", 2.5e-3)
        progress.block_done()
    return file.getvalue()


def test_a_terminal_shows_blocks_linear_loss_and_memory(monkeypatch):
    monkeypatch.setattr("quantize.job.progress.peak_memory", lambda: 5 << 29)
    shown = watched(terminal=True)
    for part in ("quantizing", "2/4", "mlp.down_proj", "loss 2.5e-03", "2.5 GiB", "left"):
        assert part in shown


def test_elsewhere_nothing_is_shown():
    assert watched(terminal=False) == ""


def test_what_is_left_is_known_however_long_a_block_takes():
    now = 0.0
    bar = progress_line(Console(file=io.StringIO(), force_terminal=True), "quantizing")
    bar.get_time = lambda: now
    task = bar.add_task("", total=80)
    for _ in range(3):
        now += 1800.0
        bar.advance(task)
    assert bar.tasks[0].time_remaining == 77 * 1800
