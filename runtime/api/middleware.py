"""ASGI middleware around every endpoint: tracks requests, rejects them while the server stops, limits their bodies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api import json_log
from runtime.api.errors import ApiError
from runtime.api.metrics import PrometheusMetrics
from runtime.api.options import Limits

CLIENT_CLOSED_REQUEST = 499  # logged when the client disconnects before the response; nginx uses the same number
DRAIN_SECONDS = 2  # to read the body of a rejected request
_PAGE = "page"


class RequestTracker:
    """State shared by the middleware and the server.

    Attributes:
        in_flight: API requests that are not answered yet.
        stopping: whether new requests are rejected.
    """

    def __init__(self, paths: Collection[str], metrics: PrometheusMetrics):
        """`paths` are the paths of the API; all other paths belong to the page."""
        self.paths = paths
        self.metrics = metrics
        self.in_flight = 0
        self.stopping = False

    def endpoint(self, scope: Scope) -> str:
        """Return the path if the API has it, else `page`, so that clients cannot create new metric labels."""
        return scope["path"] if scope["path"] in self.paths else _PAGE


class RequestTrackingMiddleware:
    """The outermost middleware, so that it also sees requests that other middleware rejects."""

    def __init__(self, app: ASGIApp, request_tracker: RequestTracker):
        self._app = app
        self._tracker = request_tracker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and record its status and duration."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        tracker, start, status = self._tracker, time.perf_counter(), CLIENT_CLOSED_REQUEST
        endpoint = tracker.endpoint(scope)

        async def send_and_watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app = _reject if tracker.stopping else self._app
        tracker.in_flight += endpoint != _PAGE
        try:
            await app(scope, receive, send_and_watch)
        except Exception:  # Starlette answers it with 500
            status = 500
            raise
        finally:
            tracker.in_flight -= endpoint != _PAGE
            self._record_request(scope, endpoint, status, time.perf_counter() - start)

    def _record_request(self, scope: Scope, endpoint: str, status: int, seconds: float) -> None:
        self._tracker.metrics.record_request(endpoint, status, seconds)
        if endpoint == _PAGE and status < 400:
            return  # the page loads dozens of files
        client = scope.get("client")
        json_log.write(
            "request",
            method=scope["method"],
            path=endpoint if endpoint != _PAGE else scope["path"][:200],
            status=status,
            seconds=round(seconds, 4),
            client=client[0] if client else None,
            **scope.get("worldpm.scored", {}),
        )


async def _reject(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503.

    The body is read first, because closing a connection with unread bytes resets it and the response is lost.
    """
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain_body(receive), DRAIN_SECONDS)
    await ApiError(503, "The server is stopping; retry when it is running again.", retry_after=5).response(
        {"Connection": "close"}
    )(scope, receive, send)


async def _drain_body(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


# Without it, the unread rest of the body would be parsed as the next request.
_CLOSE = {"Connection": "close"}


class BodyLimitMiddleware:
    """Reads the whole body of requests to `paths` within the limits, before the endpoint is called."""

    def __init__(self, app: ASGIApp, paths: Collection[str], limits: Limits):
        self._app = app
        self._paths = paths
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with the body as one message, or answer 408 or 413."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            return await self._app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._limits.body_seconds)
        except asyncio.TimeoutError:
            seconds = f"{self._limits.body_seconds:g}"
            error = ApiError(408, f"body: it took longer than {seconds} s to arrive; send fewer conversations.", "body")
        except ApiError as found:
            error = found
        except ClientDisconnect:
            return
        else:
            return await self._app(scope, _replay(body, receive), send)
        await error.response(_CLOSE)(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body. One above the limit is read to its end and discarded, because many clients read no response
        before they have sent the whole body."""
        most, headers = self._limits.body_bytes, Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most and headers.get("expect", "").lower() == "100-continue":
            raise _too_large(most)
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message.get("body", b""))
            if size <= most:
                body += message.get("body", b"")
            else:
                body.clear()
            more = message.get("more_body", False)
        if size > most:
            raise _too_large(most)
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives the body once, then the messages of `receive`, such as a disconnect."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"body: it has more than the {most:,} bytes allowed; send fewer conversations per request.", "body"
    )
