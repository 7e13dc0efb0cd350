"""The server's log: one JSON object per line on standard error."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any


def write(event: str, **fields: Any) -> None:
    """Write one line; fields that are None are omitted."""
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    present_fields = {name: value for name, value in fields.items() if value is not None}
    sys.stderr.write(json.dumps({"time": time, "event": event, **present_fields}, default=str) + "\n")
    sys.stderr.flush()


def log_error(error: BaseException, **fields: Any) -> None:
    """Write an unexpected error with its traceback. Without local variables, so without conversation text."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    write("error", error=type(error).__name__, traceback="".join(lines), **fields)


class JsonLogHandler(logging.Handler):
    """Writes log records of libraries to the JSON log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, with the traceback of an exception."""
        failure = record.exc_info[1] if record.exc_info else None
        if isinstance(failure, asyncio.CancelledError):
            return  # the server stopped an event stream of the page
        if failure is not None:
            log_error(failure, logger=record.name, message=record.getMessage().strip())
        else:
            write("log", level=record.levelname.lower(), logger=record.name, message=record.getMessage())
