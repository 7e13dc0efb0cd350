"""The server's log: one JSON object a line, on standard error."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any


def write(event: str, **fields: Any) -> None:
    """One line; fields that are None are left out."""
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    told = {name: value for name, value in fields.items() if value is not None}
    sys.stderr.write(json.dumps({"time": time, "event": event, **told}, default=str) + "\n")
    sys.stderr.flush()


def write_error(error: BaseException, **fields: Any) -> None:
    """What only we can cause, with its traceback, which holds no locals and so no conversation text."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    write("error", error=type(error).__name__, traceback="".join(lines), **fields)


class JournalHandler(logging.Handler):
    """Brings what libraries log into the journal."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, with the traceback if there is one."""
        failure = record.exc_info[1] if record.exc_info else None
        if isinstance(failure, asyncio.CancelledError):
            return  # an event stream of the page, ended with the server
        if failure is not None:
            write_error(failure, logger=record.name, message=record.getMessage().strip())
        else:
            write("log", level=record.levelname.lower(), logger=record.name, message=record.getMessage())
