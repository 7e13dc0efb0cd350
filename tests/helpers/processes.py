"""Child processes that receive Ctrl-C, however the test suite itself was started."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def default_sigint() -> Iterator[None]:
    """Handle SIGINT as Python does by default: it raises KeyboardInterrupt. Main thread only.

    A shell starts background jobs (`pytest &`, `nohup pytest`) with SIGINT ignored. Python then installs no handler,
    and child processes inherit the ignored signal. A handler that is installed while a child starts is reset to the
    default action by exec, so the child raises KeyboardInterrupt again.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def start_process(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
    """`subprocess.Popen(command, text=True, **options)` with the default action for SIGINT in the child."""
    with default_sigint():
        return subprocess.Popen(command, text=True, **options)
