"""ASGI middleware for a server below a sub-path of a proxy, such as https://example.org/reward.

The proxy may remove the sub-path or leave it. Middleware sees paths without it; the routes see them as ASGI requires,
with it and with `root_path`, from which FastAPI and gradio make the links.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class RemoveRootPath:
    """Outermost: removes the sub-path where the proxy left it."""

    def __init__(self, app: ASGIApp, root_path: str):
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on without the sub-path."""
        if scope["type"] == "http" and self._root_path and (scope["path"] + "/").startswith(self._root_path + "/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._root_path) or "/"}
        await self._app(scope, receive, send)


class AddRootPath:
    """Innermost: adds the sub-path for the routes."""

    def __init__(self, app: ASGIApp, root_path: str):
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with the sub-path."""
        if scope["type"] == "http" and self._root_path:
            scope = {**scope, "path": self._root_path + scope["path"], "root_path": self._root_path}
        await self._app(scope, receive, send)
