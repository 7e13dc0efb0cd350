"""What is fuzzed, and what must hold for each input."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz.mutation import Mutation

SECONDS, MEMORY_BYTES, MESSAGE_LENGTH = 2.0, 512 << 20, 1000
ENDS_AFTER = 20  # seconds of processor time, after which the process is ended


@dataclass(frozen=True)
class Target:
    """A reader to be fuzzed.

    Attributes:
        modules: those whose coverage guides the search and is reported.
        seeds: makes valid documents.
        mutate: makes another input of an input.
        check: reads an input in a directory, where it writes the same files each time; raises anything but a
            `KitError` where a result is wrong.
        seconds: processor time that an input may take.
    """

    name: str
    modules: Sequence[str]
    seeds: Callable[[], list[bytes]]
    mutate: Mutation
    check: Callable[[bytes, Path], object]
    seconds: float = SECONDS


class Violation(AssertionError):
    """An input broke an invariant."""


class Guard:
    """Runs a target's check on inputs and watches time, memory, files and messages."""

    def __init__(self, target: Target, scratch: Path) -> None:
        self._target, self._scratch = target, scratch
        self._allowed = (str(scratch.parent), "/dev/", tempfile.gettempdir())
        self._written: list[str] = []
        self._watching = False
        self._peak = _seconds_and_peak()[1]
        sys.addaudithook(self._audit)

    def run(self, data: bytes) -> None:
        """Raise what broke an invariant; return if none was broken."""
        from runtime.common.errors import KitError

        self._written.clear()
        start, _ = _seconds_and_peak()
        signal.setitimer(signal.ITIMER_PROF, ENDS_AFTER)
        self._watching = True
        try:
            self._target.check(data, self._scratch)
        except KitError as error:
            check_message(str(error))
        finally:
            self._watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        end, peak = _seconds_and_peak()
        if end - start > self._target.seconds:
            raise Violation(f"it took {end - start:.1f} s of processor time")
        if peak - self._peak > MEMORY_BYTES:
            grown, self._peak = (peak - self._peak) >> 20, peak
            raise Violation(f"it took {grown} MiB of memory")
        if self._written:
            raise Violation(f"it wrote {self._written[0]}")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        writes = event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate")
        if event == "open":
            flags = arguments[2]
            writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if writes and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(self._allowed) and not path.endswith(".pyc"):
                self._written.append(path)


def check_message(message: str) -> None:
    """Check that a message is short and printable."""
    if len(message) > MESSAGE_LENGTH:
        raise Violation(f"the message has {len(message):,} characters: {message[:200]!r}")
    if not message.isprintable() or not message:
        raise Violation(f"the message is not printable: {message[:200]!a}")


def _seconds_and_peak() -> tuple[float, int]:
    """Processor time of this process, and the most bytes of memory that it has had."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10
