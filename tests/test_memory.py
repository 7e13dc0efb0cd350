"""What a process says of its memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.memory import peak_memory

ROOT = Path(__file__).parent.parent


def test_peak_memory_is_this_process_s_own():
    """Not that of the larger process that started it, which getrusage would report."""
    ballast = bytearray(200 << 20)
    ballast[:: 1 << 12] = b"\1" * (200 << 8)
    program = "from runtime.memory import peak_memory; print(peak_memory())"
    peak = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT))
    assert 5 << 20 < peak < 150 << 20 < len(ballast) < peak_memory()


PROGRAM = """
import ctypes, resource, sys
from runtime.memory import keep_freed_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc takes advice")
def test_what_was_kept_is_given_back_when_asked():
    asked = "give_back_freed_memory()\nprint(resident())"
    resident = "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()"
    program = f"{PROGRAM}\nfrom runtime.memory import give_back_freed_memory\n{resident}\nprint(resident())\n{asked}"
    printed = subprocess.check_output([sys.executable, "-c", program, "keep"], cwd=ROOT).split()
    kept, left = map(int, printed[-2:])
    assert kept - left > 100 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc takes advice")
def test_freed_memory_is_kept_for_the_next_activations():
    usual, kept = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, *wanted], cwd=ROOT)) for wanted in ([], ["keep"])
    )
    assert kept < usual / 10
