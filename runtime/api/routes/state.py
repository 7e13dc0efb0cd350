"""State of the server: `/v1/models`, `/health` and `/metrics`."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from runtime.api.scoring import LOADING_RETRY_SECONDS
from runtime.api.service import Service

router = APIRouter(tags=["state"])
_STARTED = int(time.time())


class ModelCard(BaseModel):
    """A served model."""

    id: Annotated[str, Field(description="The value of `model` in requests.")]
    object: Literal["model"] = "model"
    created: int = _STARTED
    owned_by: str = "worldpm-kit"
    weights: Annotated[str, Field(description="Format of the weights, such as `gptq weights of 4 bits`.")]
    max_model_len: Annotated[int, Field(description="Maximum tokens of a conversation.")]
    error_margin: Annotated[float | None, Field(description="As in `/v1/comparisons`.")]


class ModelsAnswer(BaseModel):
    """The served models, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class HealthAnswer(BaseModel):
    """Whether the server is ready, else the progress or the error of loading."""

    ready: bool
    status: str
    models: list[str]


@router.get("/v1/models", summary="List the models")
async def list_models(request: Request) -> ModelsAnswer:
    """The models that are loaded so far."""
    service: Service = request.app.state.service
    return ModelsAnswer(
        data=[
            ModelCard(
                id=model.name,
                weights=model.variant.weights_description,
                max_model_len=model.variant.renderer.max_positions,
                error_margin=model.error_margin,
            )
            for model in list(service.models.values())
        ]
    )


@router.head("/health", include_in_schema=False)  # what load balancers ask
@router.get(
    "/health",
    summary="Whether all models are loaded",
    responses={503: {"model": HealthAnswer, "description": "Not ready; `status` has the progress or the error."}},
)
async def health(request: Request, response: Response) -> HealthAnswer:
    """200 if all models are loaded, else 503. Needs no key."""
    service: Service = request.app.state.service
    if not service.ready:
        response.status_code = 503
        if service.failure is None:
            response.headers["Retry-After"] = str(LOADING_RETRY_SECONDS)
    status = "ready" if service.ready else service.failure or service.status
    return HealthAnswer(ready=service.ready, status=status, models=list(service.models))


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
    },
)
async def metrics(request: Request) -> Response:
    """Requests by endpoint and status, conversations, tokens, queue length, batches and durations."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
