"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes in `20GiB`, `500MB` or `1073741824`; 0 where it is no such size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text.strip(), re.ASCII)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def show_size(count: float) -> str:
    """Bytes in the largest unit of which there is one: `18.1 GiB`, `3.5 MiB`, `0.4 KiB`."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / KIB:.1f} KiB"
