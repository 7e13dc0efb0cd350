"""What commands have in common: how their help looks, and how they end. The story is a function of their own."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.console import Console

from runtime.errors import MENDABLE, KitError, in_words
from runtime.memory import keep_freed_memory

STOPPED = 130
BROKEN_PIPE = 141  # what a shell reports of a process that SIGPIPE ended


def run_command(
    parse: Callable[[list[str] | None], Namespace],
    story: Callable[[Namespace, Console], int],
    way_on: Callable[[Namespace], str],
    argv: list[str] | None = None,
) -> int:
    """Run `story` on what `parse` made of the command line, and return the exit status.

    What a user can mend is one line on standard error and status 2; anything else stays a traceback. A command
    that was stopped, by Ctrl-C or SIGTERM, says what `way_on` makes of its arguments.
    """
    keep_freed_memory()
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        arguments = parse(argv)
        try:
            return story(arguments, console)
        except KeyboardInterrupt:
            console.print(f"stopped; {way_on(arguments)}")
            return STOPPED
    except KitError as error:
        console.print(f"error: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        console.print(f"error: {in_words(error)}")
    return 2


def make_parser(typed: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of its texts, for what the user typed: `typed`, or the installed command."""
    name = typed if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    return argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
