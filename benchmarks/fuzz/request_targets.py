"""Target: requests to the HTTP API, in this process and with a stand-in for the model."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

from fastapi import FastAPI

from benchmarks.fuzz.mutation import mutate_json
from benchmarks.fuzz.target import Target, Violation, check_message
from runtime.api.application import make_api
from runtime.api.options import Limits
from runtime.conversations.rendering import RenderedConversation
from tests.helpers.served import ENDPOINTS, RESPONSES, chatml, conversation, serve
from tests.helpers.tiny import write_tiny_checkpoint

PAIR = {"prompt": "Q", "response_a": "A", "response_b": "B"}
BODIES: dict[str, list[Any]] = {
    "/v1/scores": [{"conversations": [conversation(text) for text in RESPONSES], "truncate": True, "model": "tiny"}],
    "/v1/comparisons": [PAIR, {"pairs": [PAIR | {"prompt": conversation("A")[:1]}, PAIR]}],
    "/get_reward": [{"query": [chatml("A"), "User: Q\nAssistant: A"], "prompts": ["User: Q", ""], "labels": ["", ""]}],
    "/get_reward?system=drop&blank=-1.5&model=tiny": [{"query": chatml(" ")}],
    "/pooling": [{"input": chatml("A"), "task": "classify"}, {"messages": conversation("A"), "use_activation": False}],
    "/classify": [{"text": [chatml("A")]}, {"input": chatml("A")}, {"messages": conversation("A"), "activation": None}],
    "/score": [{"queries": "Q", "documents": ["A", "B"]}, {"text_1": ["Q", "R"], "text_2": ["A", "B"]}],
    "/rerank": [{"query": "Q", "documents": ["A", "B"], "top_n": 1, "truncate_prompt_tokens": None}],
    "/v1/embeddings": [{"input": [chatml("A")], "encoding_format": "base64", "dimensions": 1}],
}


class StandIn:
    """A scorer whose score is a function of the token ids."""

    def score_each(self, rendered: Sequence[RenderedConversation]) -> list[float]:
        return [math.sin(sum(each.token_ids)) * 10 for each in rendered]


@cache
def _api() -> FastAPI:
    service = serve(write_tiny_checkpoint(Path(mkdtemp(prefix="fuzz-served-"))))
    service.models["tiny"].scorer = StandIn()  # type: ignore[assignment]
    return make_api(service, Limits(tokens=20_000, conversations=64, turns=50), None)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _requests() -> list[bytes]:
    _api()
    return [f"{path}\n{json.dumps(body)}".encode() for path, bodies in BODIES.items() for body in bodies]


def mutate_request(data: bytes, random: Random) -> bytes:
    """Change the path, the query or the body."""
    line, _, body = data.partition(b"\n")
    kind = random.randrange(12)
    if kind == 0:
        line = random.choice([*ENDPOINTS, "/v2/rerank", *BODIES]).encode()
    elif kind == 1:
        line += random.choice((b"?", b"&")) + random.choice(
            (b"blank=nan", b"blank=1e999", b"system=x", b"model=%00", b"blank=2")
        )
    else:
        body = mutate_json(body, random)
    return line + b"\n" + body


def _check_request(data: bytes, scratch: Path) -> None:
    """Each answer is documented; an error has its shape and its field, and no request fails the server."""
    line, _, body = data.partition(b"\n")
    path, _, query = line.partition(b"?")
    if not path.startswith(b"/") or not path.isascii():
        return
    log = io.StringIO()
    with redirect_stderr(log):
        status, answer = _loop().run_until_complete(_send(path.decode(), query, body))
    if status >= 500 or '"event": "error"' in log.getvalue():
        raise Violation(f"status {status}: {answer[:300]!r} {log.getvalue()[:300]}")
    content = json.loads(answer)
    if status >= 400:
        error = content["error"]
        check_message(error["message"])
        if error["code"] != status or len(error["field"] or "") > 300:
            raise Violation(f"the error is {error!r:.300}")
    elif "NaN" in answer.decode() or "Infinity" in answer.decode():
        raise Violation("a score is not finite")


async def _send(path: str, query: bytes, body: bytes) -> tuple[int, bytes]:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    sent: list[Any] = []
    answered = asyncio.Event()
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        if (message := next(received, None)) is not None:
            return message
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        await _api()(scope, receive, send)
    finally:
        answered.set()
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


MODULES = [f"runtime.api.{name}" for name in ("scoring", "errors", "schema", "middleware", "routes")]
TARGETS = [Target("request", MODULES, _requests, mutate_request, _check_request)]
