"""Access control: the API key, the Host header and the Origin header."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import stat
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.api.errors import ApiError
from runtime.common.errors import ConfigurationError

UNAUTHENTICATED_PATH = "/health"
_MIN_KEY_LENGTH = 8
# `Basic` makes browsers ask for the password. RFC 7617.
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="worldpm-kit", charset="UTF-8"'}


# Starlette's TrustedHostMiddleware has no pattern for "any IP address" and answers in plain text. FastAPI's HTTPBearer
# is a dependency of routes, so it protects neither the mounted page nor unknown paths, and it has no Basic scheme.
class AccessMiddleware:
    """Rejects requests with a foreign Host or Origin header, or without the key, for the API and the page.

    Host: DNS rebinding lets a foreign page call this server under that page's host name, but not under an IP address,
    so IP addresses are always accepted. Origin: a browser sends cross-site form posts and uploads without a preflight
    request, and adds the stored password to them.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str] | None, origins: Collection[str]):
        """Set the rules.

        Args:
            key: required by every path but `UNAUTHENTICATED_PATH`; None requires no key.
            hosts: accepted host names, besides IP addresses; None accepts any.
            origins: accepted origins, besides the server's own.
        """
        self._app = app
        self._key_digest = None if key is None else _digest(key)
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400, 401 or 403."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        error = self._check(scope["path"], Headers(scope=scope))
        if error is None:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await error.response(_CHALLENGE if error.status == 401 else None)(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> ApiError | None:
        if not self._accepts_host(headers.get("host", "")):
            return ApiError(
                400, "The Host header is not a name of this server; use an IP address, or add --allowed-host.", "Host"
            )
        if not self._accepts_origin(headers):
            return ApiError(
                403, "The Origin header names another site; start the server with --cors-origin for it.", "Origin"
            )
        if self._key_digest and path != UNAUTHENTICATED_PATH and not self._has_key(headers.get("authorization", "")):
            return ApiError(401, "The key is missing or wrong; send it as Authorization: Bearer KEY.")
        return None

    def _accepts_host(self, header: str) -> bool:
        if self._hosts is None:
            return True
        name = header.rpartition(":")[0] if ":" in header.rpartition("]")[2] else header  # drop the port
        name = name.strip("[]").lower()
        return name in self._hosts or _is_ip_address(name)

    def _accepts_origin(self, headers: Headers) -> bool:
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
        return hmac.compare_digest(_digest(given), self._key_digest or b"")


def _digest(key: str) -> bytes:
    """SHA-256: equal lengths make `compare_digest` take constant time."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def read_key(path: Path, console: Console) -> str:
    """Read the API key from a file, without surrounding white space; warn if other users can read the file.

    Raises:
        ConfigurationError: the file cannot be read, or does not hold a valid key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--api-key-file {path} cannot be read ({error}); name a text file that holds the key."
        ) from error
    if len(key) < _MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            f"--api-key-file {path} holds {len(key)} characters; a key has at least {_MIN_KEY_LENGTH} "
            f"printable ASCII characters and no spaces, such as from `openssl rand -hex 32`."
        )
    if mode & 0o077:
        console.print(f"warning: {path} has mode {mode:03o}, so other users can read the key; run chmod 600 {path}")
    return key
