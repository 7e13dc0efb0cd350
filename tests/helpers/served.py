"""A service over the tiny checkpoint, ways to send it requests, and a scorer that blocks or fails on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from runtime.api.application import make_api
from runtime.api.options import Limits
from runtime.api.server import Server, listen
from runtime.api.service import Service
from runtime.conversations.rendering import RenderedConversation
from runtime.evaluation.variant import Variant
from runtime.execution.nonfinite import nonfinite_error
from runtime.scorer import Scorer, ScoreResult

QUESTION = "Tips for better sleep?"
RESPONSES = ["Keep a regular bedtime.", "idk lol", "Sleep {with} <|im_end|> typed, naïve 日本 🙂"]
ENDPOINTS = ("/v1/scores", "/v1/comparisons", "/get_reward", "/pooling", "/classify", "/score", "/v1/score")
ENDPOINTS += ("/rerank", "/v1/rerank", "/v1/embeddings")


def conversation(response: str, question: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def chatml(response: str, question: str = QUESTION) -> str:
    """The conversation as text in ChatML, as policies render it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"


def serve(checkpoint: Path, **options: Any) -> Service:
    """A ready service with one model called `tiny`."""
    service = Service(**options)
    variant = replace(Variant.open(str(checkpoint)), label="tiny")
    service.add(variant, Scorer(variant.checkpoint))
    service.ready = True
    return service


@cache
def api_of(service: Service, limits: Limits | None = None, key: str | None = None, **options: Any) -> FastAPI:
    """The application over a service; cached because building it is slow, so `options` must be hashable."""
    return make_api(service, limits or Limits(), key, **options)


def send(api: FastAPI, path: str, body: Any = None, method: str = "", **options: Any) -> httpx.Response:
    """Send one request through the whole application, without a socket."""

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            if body is not None:
                options["json"] = body
            posts = body is not None or "content" in options
            return await client.request(method or ("POST" if posts else "GET"), path, **options)

    return asyncio.run(once())


class Gate:
    """A scorer that blocks until `open` is set; a conversation of `bad` tokens has no finite score."""

    def __init__(self, scorer: Scorer, bad: int = -1):
        self.checkpoint, self.plan, self.renderer = scorer.checkpoint, scorer.plan, scorer.renderer
        self.open = threading.Event()
        self.entered = threading.Event()
        self.calls: list[list[int]] = []
        self._scorer, self._bad = scorer, bad

    def score_each(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        self.calls.append([len(each.token_ids) for each in rendered])
        self.entered.set()
        assert self.open.wait(30)
        results = self._scorer.score_each(rendered)
        for row, each in enumerate(rendered):
            if len(each.token_ids) == self._bad:
                results[row] = nonfinite_error(None)
        return results


def gate(service: Service, bad: int = -1) -> Gate:
    """Replace the scorer of the service's only model by a `Gate`."""
    (model,) = service.models.values()
    gated = Gate(model.scorer, bad)
    model.scorer = gated  # type: ignore[assignment]
    return gated


@contextmanager
def listening(api: FastAPI) -> Iterator[tuple[str, uvicorn.Server]]:
    """Serve the application on a socket in a thread; yield its URL and its server."""
    listener = listen("127.0.0.1", 0)
    server = Server(api)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        api.state.request_tracker.stopping = False  # because `api_of` caches the application
