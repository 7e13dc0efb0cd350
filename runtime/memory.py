"""How much memory this process has needed, and how it comes by it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage counts the parent's pages from before exec too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Have a command keep what its activations free for the next ones, and few of its compiled CPU kernels.

    By default glibc gives the pages of every large tensor back, and each must be cleared again by the kernel; kept, a
    tenth of the page faults are left, and 2 % less time of one thread. torch and oneDNN keep a kernel each for the last
    1,024 shapes of product, which takes more than a gigabyte where batches have ever new shapes; making one takes a
    fraction of a millisecond, and all blocks of a batch share its shapes, so few are enough. All this must be said
    before it is first used, and nothing takes it back, so a library would not say it.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc's malloc takes advice
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)


def give_back_freed_memory() -> None:
    """Give the system what `keep_freed_memory` kept, up to 256 MiB, before something of the size of the memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
