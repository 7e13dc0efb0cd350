"""How much memory this process has needed."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage counts the parent's pages from before exec too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
