"""What goes wrong between a client and the server, as one JSON shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from runtime.errors import printable


class FaultDetail(BaseModel):
    """What is wrong, and where."""

    message: str = Field(description="The fault, the value found and the remedy.")
    field: str | None = Field(description="What in the request it is about, such as `conversations[0][1].role`.")
    code: int = Field(description="The HTTP status.")


class FaultAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: FaultDetail


class Fault(Exception):
    """An answer other than the one asked for. `retry_after` is in whole seconds."""

    def __init__(self, status: int, message: str, field: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after = status, message, field, retry_after

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The same as HTTP."""
        detail = FaultDetail(message=printable(self.message), field=self.field, code=self.status)
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(FaultAnswer(error=detail).model_dump(), self.status, {**retry, **(headers or {})})


_REASONS = {
    400: "The body is no JSON, or the Host header names another host.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    422: "A field is missing, of a wrong type, or beyond a limit; or a conversation cannot be scored.",
    429: "The queue is full; `Retry-After` says for how long.",
    500: "A score is not finite, or the server failed.",
    503: "The model is not loaded yet, or the server is stopping.",
}
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultAnswer, "description": reason} for status, reason in _REASONS.items()
}
"""What an endpoint that scores can answer other than 200, for the OpenAPI document."""


def handle_faults(api: FastAPI) -> None:
    """Answer every exception in the one shape."""

    @api.exception_handler(Fault)
    async def _fault(request: Request, fault: Fault) -> JSONResponse:
        return fault.response()

    @api.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first, *others = error.errors()
        field = field_name(first["loc"])
        more = f" ({len(others)} more)" if others else ""
        if first["type"] == "json_invalid":
            return Fault(400, f"The body is no JSON: {first['ctx']['error']}.", "body").response()
        if field == "body" and first["type"] in ("model_attributes_type", "dict_type", "missing"):
            return Fault(422, "body: a JSON object, sent as application/json, was expected.", "body").response()
        reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        return Fault(422, f"{field}: {reason}.{more}", field).response()

    @api.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return Fault(error.status_code, f"{error.detail}.").response(dict(error.headers or {}))

    @api.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return Fault(500, "The server failed; its log says why.").response()  # the server logs what is raised on


def field_name(location: Sequence[str | int]) -> str:
    """`conversations[0].role` of a pydantic location that begins with `body` or `query`.

    Where a field takes either of two types, pydantic names the type too, which is no part of the request.
    """
    name = ""
    for part in location[1:]:
        if part == "str" or str(part).startswith("list["):
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return printable(name)[:200] or str(location[0])
