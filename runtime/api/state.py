"""What there is and how it fares: `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from runtime.api.scoring import RETRY_LOADING
from runtime.api.service import Service

router = APIRouter(tags=["state"])
_STARTED = int(time.time())


class ModelCard(BaseModel):
    """A model that is served."""

    id: Annotated[str, Field(description="What requests name as `model`.")]
    object: Literal["model"] = "model"
    created: int = _STARTED
    owned_by: str = "worldpm-kit"
    weights: Annotated[str, Field(description="Such as `gptq weights of 4 bits`.")]
    max_model_len: Annotated[int, Field(description="Tokens of the longest conversation.")]
    error_margin: Annotated[float | None, Field(description="As in `/v1/comparisons`.")]


class ModelsAnswer(BaseModel):
    """All of them, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthAnswer(BaseModel):
    """Whether requests are answered, and why not."""

    ready: bool
    status: str
    models: list[str]


@router.get("/v1/models", summary="Models that are served")
async def list_models(request: Request) -> ModelsAnswer:
    """Those that are loaded so far."""
    service: Service = request.app.state.service
    return ModelsAnswer(
        data=[
            ModelCard(
                id=model.name,
                weights=model.variant.weights,
                max_model_len=model.variant.renderer.max_positions,
                error_margin=model.error_margin,
            )
            for model in list(service.models.values())
        ]
    )


@router.get(
    "/health",
    summary="Whether all models are loaded",
    responses={503: {"model": HealthAnswer, "description": "Not yet; `status` says how far it is."}},
)
async def health(request: Request, response: Response) -> HealthAnswer:
    """200 once requests are answered, 503 before. Asks for no key."""
    service: Service = request.app.state.service
    if not service.ready:
        response.status_code = 503
        if service.failure is None:
            response.headers["Retry-After"] = str(RETRY_LOADING)
    status = "ready" if service.ready else service.failure or service.status
    return HealthAnswer(ready=service.ready, status=status, models=list(service.models))


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text."}},
)
async def metrics(request: Request) -> Response:
    """Requests by endpoint and status, conversations, tokens, the queue, batches and seconds."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
