"""Dynamic batching: one bounded queue and one scoring thread for all models of the process.

Conversations of waiting requests to the same model are scored in one batch of at most `batch_tokens` tokens (a longer
conversation is scored alone). A request that does not fit moves to the end of the queue with its remaining
conversations, so a long request delays a short one by about one batch. The queue is limited in tokens.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtime.common.errors import KitError, in_conversation
from runtime.conversations.rendering import RenderedConversation
from runtime.scorer import ScoreResult

QUEUE_TOKENS = 262_144
BATCH_WAIT_SECONDS = 0.005  # wait after a shared batch: its clients often send their next requests together
LONGEST_RETRY = 60  # seconds


class QueueRejectedError(KitError):
    """The queue did not accept a request.

    Attributes:
        retry_after: whole seconds after which the client may try again.
    """

    def __init__(self, text: str, retry_after: int):
        super().__init__(text)
        self.retry_after = retry_after


class ServerBusyError(QueueRejectedError):
    """The queue is full."""


class ServerStoppingError(QueueRejectedError):
    """The queue is closed because the server is stopping; retrying in this process is useless."""


class ScoringModel(Protocol):
    """A model that the batcher can call."""

    batch_tokens: int  # tokens that one call should get

    def score(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        """Return a score, or why there is none, for each conversation. Called only by the batcher's thread."""


def count_tokens(rendered: Sequence[RenderedConversation]) -> int:
    """Total tokens; a shared prefix counts once per conversation."""
    return sum(len(each.token_ids) for each in rendered)


@dataclass(eq=False)
class _Request:
    """A queued request. `taken` conversations, the first ones, are already in batches."""

    model: ScoringModel
    rendered: Sequence[RenderedConversation]
    each: bool  # whether the future gives errors among the results; otherwise the first one fails the request
    future: Future[Any] = field(default_factory=Future)
    results: list[ScoreResult] = field(default_factory=list)
    taken: int = 0
    tokens_left: int = 0  # of the conversations that are not taken

    def __post_init__(self) -> None:
        self.tokens_left = count_tokens(self.rendered)

    def take(self, tokens: int) -> list[RenderedConversation]:
        """Take the next conversations that fit in `tokens`."""
        rows: list[RenderedConversation] = []
        for row in self.rendered[self.taken :]:
            if (tokens := tokens - len(row.token_ids)) < 0:
                break
            rows.append(row)
        self.taken += len(rows)
        self.tokens_left -= count_tokens(rows)
        return rows

    def resolve(self, result: list[ScoreResult] | Exception) -> None:
        """Set the future's result, unless the client cancelled it."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


_Batch = list[tuple[_Request, list[RenderedConversation]]]


class Batcher:
    """The queue and its scoring thread.

    Attributes:
        batches: batches scored so far.
        on_batch: called in the batcher's thread after each batch with the number of conversations, of tokens, and
            the seconds.
    """

    def __init__(self, queue_tokens: int = QUEUE_TOKENS):
        """`queue_tokens` limits the tokens that wait; an empty queue accepts a request of any size."""
        self.queue_tokens = queue_tokens
        self.batches = 0
        self.on_batch: Callable[[int, int, float], None] | None = None
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()  # its lock is reentrant and guards the queue
        self._closed = False
        self._last_batch_shared = False  # whether the last batch held several requests
        self._tokens_per_second = 1000.0  # moving average; this start value is a guess
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting_requests(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Number of tokens in the queue."""
        with self._changed:
            return sum(request.tokens_left for request in self._queue)

    def submit(self, model: ScoringModel, rendered: Sequence[RenderedConversation]) -> Future[list[float]]:
        """Queue one request; the future gives one score per conversation, or raises the first conversation's error.

        Cancelling the future removes the conversations that are not in a batch yet.

        Raises:
            ServerBusyError: the queue is full.
            ServerStoppingError: the queue is closed.
        """
        return self._queue_request(_Request(model, rendered, each=False))

    def submit_each(self, model: ScoringModel, rendered: Sequence[RenderedConversation]) -> Future[list[ScoreResult]]:
        """`submit`, but the future gives the result of each conversation and does not raise a conversation's error."""
        return self._queue_request(_Request(model, rendered, each=True))

    def _queue_request(self, request: _Request) -> Future[Any]:
        if not request.rendered:
            request.resolve([])
            return request.future
        with self._changed:
            if self._closed:
                raise ServerStoppingError("The server is stopping; retry when it is running again.", 5)
            waiting = self.waiting_tokens
            if waiting and waiting + request.tokens_left > self.queue_tokens:
                raise ServerBusyError(
                    f"The queue is full: {waiting:,} tokens wait, this request adds {request.tokens_left:,}, and the "
                    f"limit is {self.queue_tokens:,}; retry later.",
                    min(LONGEST_RETRY, math.ceil(waiting / self._tokens_per_second)),
                )
            self._queue.append(request)
            self._changed.notify_all()
        request.future.add_done_callback(lambda future: self._remove_request(request) if future.cancelled() else None)
        return request.future

    def close(self) -> None:
        """Reject new requests, and return when all queued requests are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _remove_request(self, request: _Request) -> None:
        with self._changed:
            if request in self._queue:
                self._queue.remove(request)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._score(batch)

    def _next_batch(self) -> _Batch:
        """Wait for the conversations of the next batch, by request; empty when the queue is closed and empty."""
        with self._changed:
            while not (self._closed and not self._queue):
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._last_batch_shared and not self._closed:
                    self._changed.wait_for(lambda: self._is_full() or self._closed, timeout=BATCH_WAIT_SECONDS)
                if self._queue:  # a cancelled request may have emptied it during the wait
                    return self._take()
            return []

    def _is_full(self) -> bool:
        return bool(self._queue) and self.waiting_tokens >= self._queue[0].model.batch_tokens

    def _take(self) -> _Batch:
        """Take a batch for the first request's model; requests with conversations left move to the end."""
        model = self._queue[0].model
        left = model.batch_tokens
        batch: _Batch = []
        for request in [each for each in self._queue if each.model is model]:
            rows = request.take(left if batch else max(left, len(request.rendered[request.taken].token_ids)))
            if not rows:
                continue
            left -= count_tokens(rows)
            batch.append((request, rows))
            self._queue.remove(request)
            if request.taken < len(request.rendered):
                self._queue.append(request)
        return batch

    def _score(self, batch: _Batch) -> None:
        model = batch[0][0].model
        rendered = [each for _, rows in batch for each in rows]
        try:
            results = iter(self._score_timed(model, rendered))
        except Exception as error:  # fails these requests; the thread continues
            for request, _ in batch:
                self._fail(request, error)
        else:
            for request, rows in batch:
                self._answer(request, [next(results) for _ in rows])
        self._last_batch_shared = len(batch) > 1

    def _answer(self, request: _Request, results: list[ScoreResult]) -> None:
        """Add the results of the request's next conversations, and resolve the request if it has all of them."""
        for result in results:
            if isinstance(result, KitError) and not request.each:
                self._fail(request, in_conversation(result, len(request.results)))
                return
            request.results.append(result)
        if len(request.results) == len(request.rendered):
            request.resolve(request.results)

    def _score_timed(self, model: ScoringModel, rendered: list[RenderedConversation]) -> list[ScoreResult]:
        """Score a batch and record its time, before any client is answered, so that /metrics includes it by then."""
        start = time.perf_counter()
        try:
            return model.score(rendered)
        finally:
            tokens, seconds = count_tokens(rendered), time.perf_counter() - start
            self.batches += 1
            self._tokens_per_second += 0.2 * (tokens / max(seconds, 1e-6) - self._tokens_per_second)
            if self.on_batch is not None:
                self.on_batch(len(rendered), tokens, seconds)

    def _fail(self, request: _Request, error: Exception) -> None:
        self._remove_request(request)
        request.resolve(error)
