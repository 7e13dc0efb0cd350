"""Peak memory, and freed memory that is kept or released."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.common.process_memory import peak_memory

ROOT = Path(__file__).resolve().parents[2]


def test_peak_memory_excludes_the_parent_process():
    """getrusage would include the larger parent process."""
    ballast = bytearray(200 << 20)
    ballast[:: 1 << 12] = b"\1" * (200 << 8)
    program = "from runtime.common.process_memory import peak_memory; print(peak_memory())"
    peak = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert 5 << 20 < peak < 150 << 20 < len(ballast) < peak_memory()


PROGRAM = """
import ctypes, resource, sys
from runtime.common.process_memory import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for turn in range(12):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [libc.malloc(30 << 20) for _ in range(4)]
    for buffer in buffers:
        libc.memset(buffer, 1, 30 << 20)
    for buffer in buffers:
        libc.free(buffer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_kept_memory_is_released():
    program = (
        PROGRAM
        + """
from runtime.common.process_memory import release_freed_memory
resident = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
print(resident())
release_freed_memory()
print(resident())
"""
    )
    printed = subprocess.check_output([sys.executable, "-c", program, "keep"], cwd=ROOT).split()
    kept, left = map(int, printed[-2:])
    assert kept - left > 100 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_freed_memory_is_kept_for_the_next_activations():
    usual, kept = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, *wanted], cwd=ROOT)) for wanted in ([], ["keep"])
    )
    assert kept < usual / 10
