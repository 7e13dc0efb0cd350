"""Error responses of the API, all in one JSON shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from runtime.common.errors import presentable, printable


class ErrorDetail(BaseModel):
    """One error."""

    message: str = Field(description="The error, the value found and the remedy.")
    field: str | None = Field(description="The field of the request, such as `conversations[0][1].role`.")
    code: int = Field(description="The HTTP status.")


class ErrorAnswer(BaseModel):
    """The body of every response with status 400 or above."""

    error: ErrorDetail


class ApiError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        field: the field of the request that the error is about, if any.
        retry_after: whole seconds for the Retry-After header, if any.
    """

    def __init__(self, status: int, message: str, field: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after = status, message, field, retry_after

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """Return the HTTP response, with further `headers`."""
        detail = ErrorDetail(message=presentable(self.message), field=self.field, code=self.status)
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(ErrorAnswer(error=detail).model_dump(), self.status, {**retry, **(headers or {})})


_REASONS = {
    400: "The body is not JSON, or the Host header is not a name of this server.",
    401: "The key is missing or wrong.",
    403: "The Origin header names a page that may not use this server.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "A field is missing, has the wrong type, or exceeds a limit; or a conversation cannot be scored.",
    429: "The queue is full; retry after the seconds in `Retry-After`.",
    500: "A score is not finite, or the server failed.",
    503: "The model is not loaded yet, or the server is stopping.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": reason} for status, reason in _REASONS.items()
}
"""Error responses of the endpoints that score, for the OpenAPI document."""


def register_error_handlers(api: FastAPI) -> None:
    """Convert every exception to an `ErrorAnswer`."""

    @api.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first, *others = error.errors()
        field = field_name(first["loc"])
        more = f" ({len(others)} more)" if others else ""
        if first["type"] == "json_invalid":
            return ApiError(400, f"body: not valid JSON: {first['ctx']['error']}.", "body").response()
        if field == "body" and first["type"] in ("model_attributes_type", "dict_type", "missing"):
            return ApiError(422, "body: send a JSON object with Content-Type: application/json.", "body").response()
        reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        return ApiError(422, f"{field}: {reason}.{more}", field).response()

    @api.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{error.detail}.").response(dict(error.headers or {}))

    @api.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the exception again after this response, and uvicorn logs it.
        return ApiError(500, "Internal error; the server's log has the details.").response()


def field_name(location: Sequence[str | int]) -> str:
    """Format a pydantic error location, such as ("body", "conversations", 0, "role"), as `conversations[0].role`.

    For a union, pydantic adds the name of the member type; it is left out.
    """
    name = ""
    for part in location[1:]:
        if part == "str" or str(part).startswith("list["):
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return printable(name)[:200] or str(location[0])
