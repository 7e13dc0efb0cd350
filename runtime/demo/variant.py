"""Quantize the demo to 4 bits by running `quantize/run.py` in a subprocess."""

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

from runtime.common.errors import JobError

DEMO_VARIANT_DIRECTORY = Path("output") / "demo-gptq-4bit"
_COMMAND = Path(__file__).parent.parent.parent / "quantize" / "run.py"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BLOCKS = re.compile(r"^quantizing\b.*?(\d+)/(\d+)")


class DemoVariant:
    """The 4-bit GPTQ variant of the demo model; an interrupted quantization is resumed.

    Attributes:
        output: the variant's directory.
    """

    def __init__(self, output: Path = DEMO_VARIANT_DIRECTORY):
        self.output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether the variant exists and is complete."""
        try:
            return bool(json.loads((self.output / "job" / "job.json").read_bytes())["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def make(self, on_line: Callable[[str], None]) -> None:
        """Quantize the demo; if standard error is a terminal, the command's progress is shown there.

        Args:
            on_line: called with each line of progress.

        Raises:
            JobError: the command failed or was stopped.
        """
        command = [sys.executable, str(_COMMAND), "--bits", "4", "--output", str(self.output), "--resume"]
        parent_fd, child_fd = pty.openpty()  # the command shows no progress on a pipe
        environment = os.environ | {"COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=child_fd,
                stderr=child_fd,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(child_fd)
        if self._stopped:
            self.stop()
        last = ""
        for last in _lines(parent_fd):
            blocks = _BLOCKS.match(last)
            on_line(f"quantizing the demo: {f'block {blocks[1]} of {blocks[2]}' if blocks else last}")
        if status := self._process.wait():
            raise JobError(f"quantizing the demo ended with status {status}: {last}")

    def stop(self) -> None:
        """Stop the command; its finished blocks are kept for the next `make`."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def _lines(terminal: int) -> Iterator[str]:
    """Yield the lines written to a pseudo terminal, without escape sequences; copy the raw bytes to a real one."""
    rest = ""
    with os.fdopen(terminal, "rb", buffering=0) as stream:
        while True:
            try:
                piece = stream.read(4096)
            except OSError:  # raised by Linux when the other end is closed
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
