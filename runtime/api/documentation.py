"""`/docs`: the OpenAPI document in Swagger UI, served from this origin only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

_FILES = Path(__file__).parent / "swagger_ui"
# Without 'unsafe-inline': `fastapi.openapi.docs.get_swagger_ui_html` writes an inline script, so the page is our own.
# `data:` images are icons inside the style sheet.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_CACHE_ASSETS = {"Cache-Control": "max-age=86400"}


class _Assets(StaticFiles):
    """Static files that a browser may reuse for a day."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_CACHE_ASSETS)
        return response


def add_documentation(api: FastAPI) -> None:
    """Serve `/docs` and its files under `/docs/assets`."""
    api.mount("/docs/assets", _Assets(directory=_FILES))

    @api.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(_FILES / "index.html", media_type="text/html", headers=headers)
