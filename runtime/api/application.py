"""Build the FastAPI application: routes, middleware and documentation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from runtime.api.access import AccessMiddleware
from runtime.api.documentation import add_documentation
from runtime.api.errors import register_error_handlers
from runtime.api.metrics import PrometheusMetrics
from runtime.api.middleware import BodyLimitMiddleware, RequestTracker, RequestTrackingMiddleware
from runtime.api.options import Limits
from runtime.api.root_path import AddRootPath, RemoveRootPath
from runtime.api.routes import classify, comparisons, embeddings, pooling, ranking, rewards, scores, state
from runtime.api.service import Service
from runtime.common.version import kit_version

ROUTES = (scores, comparisons, rewards, pooling, ranking, classify, embeddings, state)
"""Modules whose `router` is served; a new module of `runtime.api.routes` is added here."""

DESCRIPTION = """\
Scores of WorldPM reward models. `/v1/scores` and `/v1/comparisons` are the kit's own endpoints. The others accept the
requests of existing trainers and of clients of other servers. A conversation has the same score at every endpoint, and
its score does not depend on other conversations.
"""


def make_api(
    service: Service,
    limits: Limits,
    key: str | None,
    *,
    hosts: Collection[str] | None = None,
    cors_origins: Sequence[str] = (),
    log_text: bool = False,
    root_path: str = "",
) -> FastAPI:
    """Build the API over one service. A page may be mounted on the result.

    Args:
        key: required by every path except `/health`; None requires no key.
        hosts: accepted host names in the Host header; None accepts any.
        cors_origins: origins whose pages may call the API.
        log_text: whether conversations are written to the log.
        root_path: sub-path of a proxy, such as ``/reward``.
    """
    api = FastAPI(
        title="worldpm-kit",
        version=kit_version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    register_error_handlers(api)
    for module in ROUTES:
        api.include_router(module.router)
    add_documentation(api)
    paths = _openapi_paths(api, has_key=key is not None)
    metrics = PrometheusMetrics(service)
    request_tracker = RequestTracker({*paths, "/docs", "/openapi.json"}, metrics)
    api.state.service, api.state.limits, api.state.metrics = service, limits, metrics
    api.state.request_tracker, api.state.log_text = request_tracker, log_text

    # The middleware that is added last runs first.
    api.add_middleware(AddRootPath, root_path=root_path)
    api.add_middleware(BodyLimitMiddleware, paths={path for path in paths if "post" in paths[path]}, limits=limits)
    api.add_middleware(AccessMiddleware, key=key, hosts=hosts, origins=cors_origins)
    if cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    api.add_middleware(RequestTrackingMiddleware, request_tracker=request_tracker)
    api.add_middleware(RemoveRootPath, root_path=root_path)
    return api


def _openapi_paths(api: FastAPI, has_key: bool) -> dict[str, dict[str, Any]]:
    """Generate and cache the OpenAPI document, with the security schemes of the key, and return its paths."""
    document = api.openapi()
    if has_key:
        schemes = {scheme: {"type": "http", "scheme": scheme} for scheme in ("bearer", "basic")}
        document["components"]["securitySchemes"] = schemes
        document["security"] = [{scheme: []} for scheme in schemes]
    return document["paths"]
