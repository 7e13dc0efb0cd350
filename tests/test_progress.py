"""What a person sees while blocks are quantized, and the memory that is reported."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from quantize.progress import BlockProgress, peak_memory

ROOT = Path(__file__).parent.parent


def watched(terminal: bool) -> str:
    """What appears while two of four blocks are quantized after a resumption."""
    file = io.StringIO()
    with BlockProgress(4, 1, Console(file=file, force_terminal=terminal, width=120)) as progress:
        progress.watch("self_attn.q_proj", None)
        progress.watch("mlp.down_proj", 2.5e-3)
        progress.block_done()
    return file.getvalue()


def test_a_terminal_shows_blocks_linear_loss_and_memory():
    shown = watched(terminal=True)
    for part in ("quantizing", "2/4", "mlp.down_proj", "loss 2.5e-03", "GiB", "left"):
        assert part in shown


def test_elsewhere_nothing_is_shown():
    assert watched(terminal=False) == ""


def test_peak_memory_is_this_process_s_own():
    """Not that of the larger process that started it, which getrusage would report."""
    ballast = bytearray(200 << 20)
    ballast[:: 1 << 12] = b"\1" * (200 << 8)
    program = "from quantize.progress import peak_memory; print(peak_memory())"
    peak = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert 5 << 20 < peak < 150 << 20 < len(ballast) < peak_memory()
