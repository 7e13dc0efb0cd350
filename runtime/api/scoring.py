"""From conversations in a request to their scores: what all endpoints that score have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from runtime.api import journal
from runtime.api.batcher import Busy, count_tokens
from runtime.api.faults import Fault
from runtime.api.limits import Limits
from runtime.api.service import ServedModel, Service
from runtime.api.traffic import GONE
from runtime.chat import Rendered
from runtime.conversation import Message
from runtime.errors import ConversationError, KitError

RETRY_LOADING = 5  # seconds


@dataclass(frozen=True)
class Conversation:
    """Something to score, and what the request calls it."""

    field: str
    messages: Sequence[Message]


@dataclass(frozen=True)
class Scored:
    """What came of it; one score and one rendering a conversation."""

    model: ServedModel
    scores: list[float]
    rendered: list[Rendered]

    @property
    def tokens(self) -> list[int]:
        """Of each conversation."""
        return [len(each.token_ids) for each in self.rendered]

    @property
    def warnings(self) -> list[list[str]]:
        """Of each conversation."""
        return [each.warnings for each in self.rendered]


class Scoring:
    """The way from a request to scores.

    Attributes:
        request: whose client is watched, so that a request nobody waits for leaves the queue.
    """

    def __init__(self, request: Request):
        self.request = request
        self._service: Service = request.app.state.service
        self._limits: Limits = request.app.state.limits
        self._log_text: bool = request.app.state.log_text

    def model(self, name: str | None) -> ServedModel:
        """The model that a request names.

        Raises:
            Fault: 503 while models are loaded, 404 if there is none of that name.
        """
        if not self._service.ready:
            why = self._service.failure or self._service.status
            raise Fault(503, f"Not ready: {why}", retry_after=None if self._service.failure else RETRY_LOADING)
        try:
            return self._service.get(name)
        except KitError as error:
            raise Fault(404, str(error), "model") from error

    def check_count(self, count: int, field: str) -> None:
        """Raise Fault 422 if `field` holds more conversations than a request may have."""
        if count > self._limits.conversations:
            raise Fault(
                422,
                f"{field} holds {count:,} conversations, and a request may have {self._limits.conversations:,}; "
                "send several requests.",
                field,
            )

    async def score(
        self, name: str | None, conversations: Sequence[Conversation], field: str, *, truncate: bool = False
    ) -> Scored:
        """Scores of what is under `field`, when its turn has come.

        Raises:
            Fault: 404 or 503 as `model`; 422 for what is beyond a limit or cannot be rendered; 429 if the queue is
                full; 500 if a score is not finite.
        """
        model = self.model(name)
        self.check_count(len(conversations), field)
        rendered = await run_in_threadpool(self._render, model, conversations, truncate)
        tokens = count_tokens(rendered)
        if tokens > self._limits.tokens:
            raise Fault(
                422,
                f"{field} holds {tokens:,} tokens, and a request may have {self._limits.tokens:,}; send several "
                "requests.",
                field,
            )
        self.request.scope["worldpm.scored"] = {
            "model": model.name,
            "conversations": len(conversations),
            "tokens": tokens,
        }
        if self._log_text:
            journal.write("text", conversations=[list(each.messages) for each in conversations])
        try:
            scores = await self._answered(model.submit(rendered))
        except Busy as busy:
            raise Fault(429, str(busy), retry_after=busy.retry_after) from busy
        except KitError as error:
            raise Fault(500, f"{field}: {error}", field) from error
        return Scored(model, scores, rendered)

    def _render(self, model: ServedModel, conversations: Sequence[Conversation], truncate: bool) -> list[Rendered]:
        rendered = []
        for each in conversations:
            if len(each.messages) > self._limits.turns:
                raise Fault(
                    422,
                    f"{each.field} has {len(each.messages):,} turns, and a conversation may have "
                    f"{self._limits.turns:,}; leave old ones out.",
                    each.field,
                )
            try:
                rendered.append(model.variant.renderer.render(each.messages, truncate=truncate, where=each.field))
            except ConversationError as error:
                raise Fault(422, str(error), each.field) from error
        return rendered

    async def _answered(self, future: Future[list[float]]) -> list[float]:
        """The scores, unless the client goes away first; then the rows leave the queue."""
        scores = asyncio.wrap_future(future)
        gone = asyncio.create_task(self._client_gone())
        either: list[asyncio.Future[Any]] = [scores, gone]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not scores.done():
                raise Fault(GONE, "The client went away.")
            return scores.result()
        finally:
            scores.cancel()
            gone.cancel()

    async def _client_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


async def _scoring(request: Request) -> Scoring:
    return Scoring(request)


Asked = Annotated[Scoring, Depends(_scoring)]
"""The dependency of every endpoint that scores."""
