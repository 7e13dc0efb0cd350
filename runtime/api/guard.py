"""Who may ask: the key, and the names under which the server is asked."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.api.faults import Fault

OPEN_PATH = "/health"
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="worldpm-kit", charset="UTF-8"'}


class Guard:
    """Middleware before everything else, the page included."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str] | None, origins: Collection[str]):
        """Without a `key` nobody is asked for one; `hosts` are names the server answers to, or None for any.

        An address is always answered to: a page of a stranger can make a browser call this server by a name of the
        stranger's, but not by its address.

        What a browser asks for another site's page is refused, unless that is one of `origins`: a form or an upload
        may be sent without asking, with the password that the browser remembers.
        """
        self._app = app
        self._key = None if key is None else _digest(key)
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it pass, or answer 400, 401 or 403."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._knows_host(headers.get("host", "")):
            fault, extra = Fault(400, "The Host header names another host; --allowed-host admits it.", "Host"), None
        elif not self._knows_origin(headers):
            fault, extra = Fault(403, "Another site's page asks; --cors-origin admits it.", "Origin"), None
        elif self._key and scope["path"] != OPEN_PATH and not self._has_key(headers.get("authorization", "")):
            fault, extra = Fault(401, "The key is missing or wrong; send it as Authorization: Bearer KEY."), _CHALLENGE
        else:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await fault.response(extra)(scope, receive, send)

    def _knows_host(self, header: str) -> bool:
        if self._hosts is None:
            return True
        name = header.rpartition(":")[0] if ":" in header.rpartition("]")[2] else header
        name = name.strip("[]").lower()
        return name in self._hosts or _is_address(name)

    def _knows_origin(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or origin.lower() in self._origins:
            return True
        return origin.lower().partition("://")[2] == headers.get("host", "").lower()

    def _has_key(self, header: str) -> bool:
        scheme, _, value = header.partition(" ")
        given = value.strip()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(_digest(given), self._key or b"")


def _digest(key: str) -> bytes:
    """Of one length whatever the key's, so that comparing takes as long for every guess."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
