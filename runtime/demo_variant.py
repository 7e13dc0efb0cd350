"""The demo's 4-bit variant: made by the quantizing command, as a process of its own, where it is missing."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.errors import JobError

OUTPUT = Path("output") / "demo-gptq-4bit"
_COMMAND = Path(__file__).parent.parent / "quantize" / "run.py"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BLOCKS = re.compile(r"^quantizing\b.*?(\d+)/(\d+)")


class DemoVariant:
    """Quantizing the demo. What was done before is gone on with."""

    def __init__(self, output: Path = OUTPUT):
        self.output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether it is there, whole."""
        try:
            return bool(json.loads((self.output / "job" / "job.json").read_bytes())["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def make(self, tell: Callable[[str], None]) -> None:
        """Make it; `tell` hears each line, and a terminal shows the command's own progress.

        Raises:
            JobError: the command failed, or was stopped.
        """
        command = [sys.executable, str(_COMMAND), "--bits", "4", "--output", str(self.output), "--resume"]
        ours, its = pty.openpty()  # on a pipe it would show no progress
        environment = os.environ | {"COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment, start_new_session=True
            )
        finally:
            os.close(its)
        if self._stopped:
            self.stop()
        last = ""
        for last in _lines(ours):
            blocks = _BLOCKS.match(last)
            tell(f"quantizing the demo: {f'block {blocks[1]} of {blocks[2]}' if blocks else last}")
        if status := self._process.wait():
            raise JobError(f"quantizing the demo ended with status {status}: {last}")

    def stop(self) -> None:
        """End the command; its finished blocks are kept."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def _lines(terminal: int) -> Iterator[str]:
    """What is written to a pseudo terminal, line by line without colours; shown as it comes if there is a real one."""
    rest = ""
    with os.fdopen(terminal, "rb", buffering=0) as stream:
        while True:
            try:
                piece = stream.read(4096)
            except OSError:  # how Linux says that nobody writes any more
                return
            if not piece:
                return
            if sys.stderr.isatty():
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
            *lines, rest = re.split(r"[\r\n]+", rest + piece.decode(errors="replace"))
            for line in lines:
                if text := " ".join(_ESCAPES.sub("", line).split()):
                    yield text
