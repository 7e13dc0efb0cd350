"""The API as one FastAPI application."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from runtime.api import classify, comparisons, embeddings, pooling, ranking, rewards, scores, state
from runtime.api.body import BodyReader
from runtime.api.documentation import add_documentation
from runtime.api.faults import handle_faults
from runtime.api.guard import Guard
from runtime.api.limits import Limits
from runtime.api.metrics import Metrics
from runtime.api.service import Service
from runtime.api.traffic import Traffic, TrafficMiddleware
from runtime.version import kit_version

DESCRIPTION = """\
Scores of WorldPM reward models. `/v1/scores` and `/v1/comparisons` are the kit's own; the others are what trainers
and clients of other servers speak already. A score is the same through every one of them, and does not depend on
what else is scored.
"""


def make_api(
    service: Service,
    limits: Limits,
    key: str | None,
    *,
    hosts: Collection[str] | None = None,
    cors_origins: Sequence[str] = (),
    log_text: bool = False,
) -> FastAPI:
    """All endpoints over one service; a page may be mounted beside them.

    Args:
        key: asked of every request but those for `/health`; None asks for nothing.
        hosts: names that a Host header may have; None for any.
        cors_origins: pages of which origins may read answers.
        log_text: whether conversations go to the journal.
    """
    api = FastAPI(
        title="worldpm-kit",
        version=kit_version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    handle_faults(api)
    for module in (scores, comparisons, rewards, pooling, ranking, classify, embeddings, state):
        api.include_router(module.router)
    add_documentation(api)
    document = api.openapi()
    if key is not None:
        schemes = {scheme: {"type": "http", "scheme": scheme} for scheme in ("bearer", "basic")}
        document["components"]["securitySchemes"] = schemes
        document["security"] = [{scheme: []} for scheme in schemes]
    documented = document["paths"]
    metrics = Metrics(service)
    traffic = Traffic({*documented, "/docs", "/openapi.json"}, metrics)
    api.state.service, api.state.limits, api.state.metrics = service, limits, metrics
    api.state.traffic, api.state.log_text = traffic, log_text

    # The last one added is the outermost.
    api.add_middleware(BodyReader, paths={path for path in documented if "post" in documented[path]}, limits=limits)
    api.add_middleware(Guard, key=key, hosts=hosts, origins=cors_origins)
    if cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    api.add_middleware(TrafficMiddleware, traffic=traffic)
    return api
