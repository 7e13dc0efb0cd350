"""A request's body, read before anything is done with it: bounded in bytes and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api.faults import Fault
from runtime.api.limits import Limits

_LAST = {"Connection": "close"}  # what is left of the body would be taken for the next request


class BodyReader:
    """Middleware of the endpoints that take a body."""

    def __init__(self, app: ASGIApp, paths: Collection[str], limits: Limits):
        self._app = app
        self._paths = paths
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the body on as one message, or answer 408 or 413."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            return await self._app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._limits.body_seconds)
        except asyncio.TimeoutError:
            seconds = f"{self._limits.body_seconds:g}"
            fault = Fault(408, f"The body took longer than {seconds} s to arrive; send it faster, or less.", "body")
        except Fault as found:
            fault = found
        except ClientDisconnect:
            return
        else:
            return await self._app(scope, _replay(body, receive), send)
        await fault.response(_LAST)(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. One that is too large is read to its end and forgotten: a client that is still sending would not
        see an answer."""
        most, headers = self._limits.body_bytes, Headers(scope=scope)
        too_large = Fault(413, f"The body has more than {most:,} bytes, which is the limit; send less at once.", "body")
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most and headers.get("expect", "").lower() == "100-continue":
            raise too_large
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
            raise too_large
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then whatever comes: that the client is gone."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay
