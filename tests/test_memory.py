"""What a process says of its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtime.memory import peak_memory

ROOT = Path(__file__).parent.parent


def test_peak_memory_is_this_process_s_own():
    """Not that of the larger process that started it, which getrusage would report."""
    ballast = bytearray(200 << 20)
    ballast[:: 1 << 12] = b"\1" * (200 << 8)
    program = "from runtime.memory import peak_memory; print(peak_memory())"
    peak = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert 5 << 20 < peak < 150 << 20 < len(ballast) < peak_memory()
