"""Score the conversations of one request: check limits, render, queue, and wait for the scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from runtime.api import json_log
from runtime.api.batcher import QueueRejectedError, ServerStoppingError, count_tokens
from runtime.api.errors import ApiError
from runtime.api.middleware import CLIENT_CLOSED_REQUEST
from runtime.api.options import Limits
from runtime.api.schema import RequestMessage
from runtime.api.service import ServedModel, Service
from runtime.common.errors import ConversationError, KitError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.rendering import RenderedConversation
from runtime.conversations.rows.policy_texts import read_policy_text
from runtime.conversations.token_ids import take_token_ids

LOADING_RETRY_SECONDS = 5


@dataclass(frozen=True)
class RequestConversation:
    """A conversation to score.

    Attributes:
        field: where it is in the request, such as `conversations[0]`; used in error messages.
        messages: the turns.
        token_ids: given in place of `messages`, which are then empty.
    """

    field: str
    messages: Sequence[ChatMessage]
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class ScoringResult:
    """The scores and the rendered conversations of a request, in the request's order."""

    model: ServedModel
    scores: list[float]
    rendered: list[RenderedConversation]

    @property
    def tokens(self) -> list[int]:
        """Number of tokens of each conversation."""
        return [len(each.token_ids) for each in self.rendered]

    @property
    def warnings(self) -> list[list[str]]:
        """Warnings of each conversation."""
        return [each.warnings for each in self.rendered]


class RequestScorer:
    """Scores the conversations of one HTTP request; endpoints get it as `RequestScorerDep`."""

    def __init__(self, request: Request):
        self._request = request
        self._service: Service = request.app.state.service
        self._limits: Limits = request.app.state.limits
        self._log_text: bool = request.app.state.log_text

    def check_count(self, count: int, field: str) -> None:
        """Check the number of conversations in `field`.

        Raises:
            ApiError: 422, there are more than `Limits.conversations`.
        """
        if count > self._limits.conversations:
            raise _too_much(field, f"{count:,} conversations", self._limits.conversations)

    async def score(
        self,
        model_name: str | None,
        conversations: Sequence[RequestConversation],
        field: str,
        *,
        truncate: bool = False,
    ) -> ScoringResult:
        """Score conversations in the service's queue.

        Args:
            model_name: the request's `model`; None for the default model.
            field: the field that holds the conversations, for error messages.
            truncate: drop the oldest turns of a conversation that is too long for the model.

        Raises:
            ApiError: 404 no such model; 422 a limit is exceeded or a conversation cannot be rendered; 429 the queue is
                full or closed; 499 the client disconnected; 500 a score is not finite; 503 the models are loading.
        """
        model = self._find_model(model_name)
        self.check_count(len(conversations), field)
        rendered = await run_in_threadpool(self._render, model, conversations, truncate)
        tokens = count_tokens(rendered)
        if tokens > self._limits.tokens:
            raise _too_much(field, f"{tokens:,} tokens", self._limits.tokens)
        # `RequestTrackingMiddleware` adds these to the request's log line.
        self._request.scope["worldpm.scored"] = {
            "model": model.name,
            "conversations": len(conversations),
            "tokens": tokens,
        }
        if self._log_text:
            texts = [list(each.messages or each.token_ids) for each in conversations]
            json_log.write("text", conversations=texts)
        try:
            scores = await self._wait_for_scores(model.submit(rendered))
        except QueueRejectedError as error:
            status = 503 if isinstance(error, ServerStoppingError) else 429
            raise ApiError(status, str(error), retry_after=error.retry_after) from error
        except KitError as error:
            raise ApiError(500, f"{field}: {error}", field) from error
        return ScoringResult(model, scores, rendered)

    def _find_model(self, name: str | None) -> ServedModel:
        service = self._service
        if not service.ready:
            retry_after = LOADING_RETRY_SECONDS if service.failure is None else None  # a failure is final
            raise ApiError(503, f"Not ready: {service.failure or service.status}", retry_after=retry_after)
        try:
            return service.get(name)
        except KitError as error:
            raise ApiError(404, str(error), "model") from error

    def _render(
        self, model: ServedModel, conversations: Sequence[RequestConversation], truncate: bool
    ) -> list[RenderedConversation]:
        rendered = []
        for each in conversations:
            if len(each.messages) > self._limits.turns:
                raise ApiError(
                    422,
                    f"{each.field} has {len(each.messages):,} turns; at most {self._limits.turns:,} are allowed; "
                    "leave out the oldest.",
                    each.field,
                )
            renderer, config = model.variant.renderer, model.variant.checkpoint.model_config
            try:
                rendered.append(
                    take_token_ids(each.token_ids, renderer, config.vocab_size, each.field)
                    if each.token_ids
                    else renderer.render(each.messages, truncate=truncate, where=each.field)
                )
            except ConversationError as error:
                raise ApiError(422, str(error), each.field) from error
        return rendered

    async def _wait_for_scores(self, future: Future[list[float]]) -> list[float]:
        """Wait for the scores, or for the client to disconnect, which cancels the future."""
        scores = asyncio.wrap_future(future)
        disconnected = asyncio.create_task(self._wait_for_disconnect())
        either: list[asyncio.Future[Any]] = [scores, disconnected]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not scores.done():
                raise ApiError(CLIENT_CLOSED_REQUEST, "The client disconnected.")
            return scores.result()
        finally:
            scores.cancel()
            disconnected.cancel()

    async def _wait_for_disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


def _too_much(field: str, found: str, limit: int) -> ApiError:
    return ApiError(
        422, f"{field} holds {found}; at most {limit:,} are allowed per request; send several requests.", field
    )


async def _get_request_scorer(request: Request) -> RequestScorer:
    return RequestScorer(request)


RequestScorerDep = Annotated[RequestScorer, Depends(_get_request_scorer)]
"""The FastAPI dependency of every endpoint that scores."""


def read_texts(
    texts: Sequence[str], field: str, prompts: Sequence[str | None] | None = None, *, keep_system: bool = True
) -> list[RequestConversation]:
    """Parse conversations that are text in a chat template, as trainers send them.

    Args:
        field: the field that holds the texts; `field[index]` names one in errors.
        prompts: the beginning of each text, if known; the rest is the response.
        keep_system: False drops system turns.

    Raises:
        ApiError: 422, a text cannot be split into turns.
    """
    conversations = []
    for row, text in enumerate(texts):
        where = f"{field}[{row}]"
        try:
            turns = read_policy_text(text, prompts[row] if prompts else None, where)
        except ConversationError as error:
            raise ApiError(422, str(error), where) from error
        kept = turns if keep_system else [turn for turn in turns if turn["role"] != "system"]
        conversations.append(RequestConversation(where, kept))
    return conversations


def read_input(
    texts: str | list[str] | list[int] | list[list[int]] | None, messages: list[RequestMessage] | None
) -> tuple[list[RequestConversation], str]:
    """Read the conversations from `input` or `messages`, exactly one of which is set, and return that field's name too.

    Raises:
        ApiError: as `read_texts`.
    """
    if messages is not None:
        return [RequestConversation("messages", [message.to_message() for message in messages])], "messages"
    assert texts is not None
    if isinstance(texts, str):
        return read_texts([texts], "input"), "input"
    values: list[Any] = [texts] if isinstance(texts[0], int) else list(texts)  # the schema allows no mixed lists
    if isinstance(values[0], str):
        return read_texts(values, "input"), "input"
    return [RequestConversation(f"input[{row}]", [], ids) for row, ids in enumerate(values)], "input"
