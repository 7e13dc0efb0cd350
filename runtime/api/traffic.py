"""Requests as they come and go: counted, measured, written to the journal, and turned away once the server stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api import journal
from runtime.api.faults import Fault
from runtime.api.metrics import Metrics

GONE = 499  # the client went away before it was answered
DRAIN_SECONDS = 2  # for the body of a request that is turned away
_PAGE = "page"


class Traffic:
    """What middleware and server share.

    Attributes:
        in_flight: requests to the API that are not answered yet.
        stopping: whether new ones are turned away.
    """

    def __init__(self, paths: Collection[str], metrics: Metrics):
        """`paths` are the API's; all others are the page's."""
        self.paths = paths
        self.metrics = metrics
        self.in_flight = 0
        self.stopping = False

    def endpoint(self, scope: Scope) -> str:
        """The path if it is one of the API's: a label must not grow with what clients invent."""
        return scope["path"] if scope["path"] in self.paths else _PAGE


class TrafficMiddleware:
    """Outermost, so that whatever else is decided about a request is seen here."""

    def __init__(self, app: ASGIApp, traffic: Traffic):
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, and note how it ended."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        traffic, start, status = self._traffic, time.perf_counter(), GONE
        endpoint = traffic.endpoint(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app = _turn_away if traffic.stopping else self._app
        traffic.in_flight += endpoint != _PAGE
        try:
            await app(scope, receive, watched)
        except Exception:  # which is answered further out
            status = 500
            raise
        finally:
            traffic.in_flight -= endpoint != _PAGE
            self._note(scope, endpoint, status, time.perf_counter() - start)

    def _note(self, scope: Scope, endpoint: str, status: int, seconds: float) -> None:
        self._traffic.metrics.note_request(endpoint, status, seconds)
        if endpoint == _PAGE and status < 400:
            return  # a page is dozens of files
        client = scope.get("client")
        journal.write(
            "request",
            method=scope["method"],
            path=endpoint if endpoint != _PAGE else scope["path"][:200],
            status=status,
            seconds=round(seconds, 4),
            client=client[0] if client else None,
            **scope.get("worldpm.scored", {}),
        )


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    """Closing a connection that has unread bytes resets it, and takes the answer away again; so they are read."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_read_off(receive), DRAIN_SECONDS)
    await Fault(503, "The server is stopping.", retry_after=5).response({"Connection": "close"})(scope, receive, send)


async def _read_off(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass
