"""Run a command: exit status, error lines, signals; and the parser that its `--help` comes from."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

from rich.console import Console

from runtime.common.errors import USER_FIXABLE_ERRNOS, KitError, describe_os_error
from runtime.common.process_memory import keep_freed_memory
from runtime.common.terminal import CommandConsole

ERROR = 2
STOPPED = 130
BROKEN_PIPE = 141  # what a shell reports for a process killed by SIGPIPE

Options = TypeVar("Options")


def run_command(
    parse: Callable[[list[str] | None], Options],
    run: Callable[[Options, Console], int],
    resume_hint: Callable[[Options], str],
    argv: list[str] | None = None,
) -> int:
    """Parse `argv`, call `run` with the options, and return the exit status.

    Errors that the user can fix are printed as one line on standard error, with status 2. All others keep their
    traceback. Ctrl-C and SIGTERM print `resume_hint(options)`, with status 130.
    """
    console, interrupts = CommandConsole(), _Interrupts()
    try:
        with interrupts:
            keep_freed_memory()
            options = parse(argv)
            try:
                return run(options, console)
            except (KeyboardInterrupt, Exception) as error:
                # Extension modules may turn a KeyboardInterrupt that reaches them into an error of their own.
                if not interrupts.received and not isinstance(error, KeyboardInterrupt):
                    raise
                console.print(f"stopped; {resume_hint(options)}")
                return STOPPED
    except KeyboardInterrupt:  # before the command began, or once more
        console.print("stopped.")
        return STOPPED
    except KitError as error:
        console.print(f"error: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports the pipe again at exit
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in USER_FIXABLE_ERRNOS:
            raise
        console.print(f"error: {describe_os_error(error)}")
    return ERROR


class _Interrupts:
    """Raises a KeyboardInterrupt in the main thread at Ctrl-C and SIGTERM.

    Attributes:
        received: whether there was one.
    """

    def __init__(self) -> None:
        self.received = False
        self._hook = sys.unraisablehook

    def __enter__(self) -> None:
        sys.unraisablehook = self._raise_again
        signal.signal(signal.SIGALRM, self._raise)
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and shells may ignore it
            signal.signal(signal.SIGINT, self._raise)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = self._hook

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt

    def _raise_again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Nothing propagates from a `__del__`: an interrupt that came in one is raised a moment later."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            self._hook(unraisable)


def make_parser(module_command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser that prints `description` and `epilog` with their line breaks.

    Args:
        module_command: program name in the usage line when the module is run with `python -m` or as a file; the
            installed command is shown by its own name.
    """
    name = module_command if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    return argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
