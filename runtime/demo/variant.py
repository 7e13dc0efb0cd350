"""Quantize the demo to 4 bits by running `quantize/run.py` in a subprocess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import MofNCompleteColumn, Progress, TextColumn

from runtime.common.errors import JobError
from runtime.common.terminal import CommandConsole, progress_line

DEMO_VARIANT_DIRECTORY = Path("output") / "demo-gptq-4bit"
POLL_SECONDS = 0.5
STATE_BYTES = 16 << 20  # a job of 80 blocks writes less than 1 MiB
_COMMAND = Path(__file__).parent.parent.parent / "quantize" / "run.py"
_LOG_LINES, _LINE_LENGTH = 3, 300  # of an error


class JobProgress(NamedTuple):
    """How far a quantizing job is, as its `job/job.json` has it (docs/quantizing.md)."""

    stage: str = ""
    done: int = 0
    total: int = 0


class DemoVariant:
    """The 4-bit GPTQ variant of the demo model; an interrupted quantization is resumed.

    Attributes:
        output: the variant's directory.
        log: what the command printed, beside that directory.
    """

    def __init__(self, output: Path = DEMO_VARIANT_DIRECTORY):
        self.output = output
        self.log = output.with_name(f"{output.name}.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether the variant exists and is complete."""
        return self._state().get("finished") is True

    @property
    def progress(self) -> JobProgress:
        """What the job has recorded last; no stage if it recorded nothing yet."""
        progress = self._state().get("progress")
        fields = progress if isinstance(progress, dict) else {}
        stage, done, total = fields.get("stage"), fields.get("done"), fields.get("total")
        if not (isinstance(stage, str) and isinstance(done, int) and isinstance(total, int)):
            return JobProgress()
        return JobProgress(stage, done, total)

    def make(self, on_line: Callable[[str], None]) -> None:
        """Quantize the demo; if standard error is a terminal, a progress line is shown there.

        Args:
            on_line: called with each new line of progress.

        Raises:
            JobError: the command failed or was stopped; with the last lines that it printed.
        """
        command = [sys.executable, str(_COMMAND), "--bits", "4", "--output", str(self.output), "--resume"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if self._stopped:
            self.stop()
        self._watch(self._process, on_line)
        if status := self._process.returncode:
            raise JobError(f"quantizing the demo {_ending(status)}: {self._last_lines()} (all of it: {self.log})")

    def stop(self) -> None:
        """Stop the command; its finished blocks are kept for the next `make`."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _watch(self, process: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> None:
        """Tell the job's progress until the process ends."""
        shown = JobProgress()
        label = "quantizing the demo"
        with progress_line(CommandConsole(), label, MofNCompleteColumn(), TextColumn("{task.description}")) as line:
            task = line.add_task("", total=None)
            while process.poll() is None:
                now = self.progress
                if now.stage != shown.stage:
                    line.reset(task, total=now.total, completed=now.done, description=now.stage)
                if now != shown:
                    line.update(task, completed=now.done)
                    on_line(f"{label}: {_describe(now, line)}")
                    shown = now
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)

    def _state(self) -> dict[str, Any]:
        """The job's file; empty if there is none, or none that can be read."""
        try:
            with open(self.output / "job" / "job.json", "rb") as file:
                state = json.loads(file.read(STATE_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return state if isinstance(state, dict) else {}

    def _last_lines(self) -> str:
        """The last lines of the log that are not empty."""
        with open(self.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - (1 << 16)))
            lines = [line.strip()[:_LINE_LENGTH] for line in log.read().decode(errors="replace").splitlines()]
        return " / ".join(list(filter(None, lines))[-_LOG_LINES:]) or "it printed nothing"


def _describe(progress: JobProgress, line: Progress) -> str:
    """`blocks, 12 of 30 (40 %), about 3 min left`; the time is known after two steps."""
    text = f"{progress.stage}, {progress.done} of {progress.total}"
    if progress.total > 0:
        text += f" ({100 * progress.done // progress.total} %)"
    left = line.tasks[0].time_remaining
    if not left:
        return text
    return f"{text}, about {f'{left:.0f} s' if left < 60 else f'{left / 60:.0f} min'} left"


def _ending(status: int) -> str:
    """How a process ended that did not succeed."""
    if status > 0:
        return f"ended with status {status}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
