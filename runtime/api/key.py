"""The key that a server asks for, out of a file."""

from __future__ import annotations

import stat
from pathlib import Path

from rich.console import Console

from runtime.errors import PlanError

_SHORTEST = 8


def read_key(path: Path, console: Console) -> str:
    """The file's text without the white space around it; a file that others can read is remarked on.

    Raises:
        PlanError: it cannot be read, or holds no key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"--api-key-file {path} cannot be read ({error}); name a file with the key in it.") from error
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise PlanError(
            f"--api-key-file {path} holds {len(key)} characters; a key of {_SHORTEST} or more ASCII ones without "
            "spaces was expected, such as `openssl rand -hex 32` makes."
        )
    if mode & 0o077:
        console.print(f"warning: {path} has mode {mode:03o}, so that others can read the key; chmod 600 {path}")
    return key
