"""What arrives together is scored together: one thread, one bounded queue, all models of the process.

Requests take turns by slices of a batch's tokens, so that a long one delays a short one by one batch at most. Rows
wait as tokens, since tokens are what a batch is limited by and what time is spent on.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from runtime.chat import Rendered
from runtime.errors import KitError, NonFiniteError

QUEUE_TOKENS = 262_144
LINGER = 0.005  # seconds in which clients that were answered together may ask again together
LONGEST_RETRY = 60


class Busy(KitError):
    """The queue is full, or closed; `retry_after` is in whole seconds."""

    def __init__(self, text: str, retry_after: int):
        super().__init__(text)
        self.retry_after = retry_after


class Closed(Busy):
    """The queue takes nothing any more, so that there is no use in asking this server again."""


class Model(Protocol):
    """What the batcher asks of a model."""

    batch_tokens: int  # that a call should bring

    def score(self, rendered: Sequence[Rendered]) -> list[float]:
        """One score a conversation. Called by the batcher's thread alone.

        Raises:
            NonFiniteError: naming the conversation by its index among `rendered`.
        """


def count_tokens(rendered: Sequence[Rendered]) -> int:
    """Tokens of all; what they share is counted for each."""
    return sum(len(each.token_ids) for each in rendered)


@dataclass(eq=False)
class _Request:
    model: Model
    rendered: Sequence[Rendered]
    future: Future[list[float]] = field(default_factory=Future)
    scores: list[float] = field(default_factory=list)
    taken: int = 0  # rows, which are taken in their order
    tokens_left: int = 0  # of rows that are not

    def __post_init__(self) -> None:
        self.tokens_left = count_tokens(self.rendered)

    def take(self, tokens: int) -> list[Rendered]:
        """The next rows, as many as `tokens` hold."""
        rows: list[Rendered] = []
        for row in self.rendered[self.taken :]:
            if (tokens := tokens - len(row.token_ids)) < 0:
                break
            rows.append(row)
        self.taken += len(rows)
        self.tokens_left -= count_tokens(rows)
        return rows

    def answer(self, outcome: list[float] | Exception) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Batcher:
    """The queue and its thread.

    Attributes:
        batches: calls to a model so far.
        on_batch: called after each with its conversations, tokens and seconds, in the batcher's thread.
    """

    def __init__(self, queue_tokens: int = QUEUE_TOKENS):
        """`queue_tokens` may wait; an empty queue takes a request of any size."""
        self.queue_tokens = queue_tokens
        self.batches = 0
        self.on_batch: Callable[[int, int, float], None] | None = None
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._crowded = False  # whether the last batch was of several requests
        self._tokens_per_second = 1000.0  # until something was measured
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting_requests(self) -> int:
        """Requests with rows in the queue."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        with self._changed:
            return self._waiting()

    def submit(self, model: Model, rendered: Sequence[Rendered]) -> Future[list[float]]:
        """Queue the rows of one request. Cancelling the future takes those out again that no batch has yet.

        Raises:
            Busy: the queue is full.
            Closed: it takes nothing any more.
        """
        request = _Request(model, rendered)
        if not rendered:
            request.answer([])
            return request.future
        with self._changed:
            if self._closed:
                raise Closed("The server is stopping; ask again when it is back.", 5)
            waiting = self._waiting()
            if waiting and waiting + request.tokens_left > self.queue_tokens:
                raise Busy(
                    f"{waiting:,} tokens are waiting, and {request.tokens_left:,} more would exceed the queue's "
                    f"{self.queue_tokens:,}; ask again later.",
                    min(LONGEST_RETRY, math.ceil(waiting / self._tokens_per_second)),
                )
            self._queue.append(request)
            self._changed.notify_all()
        request.future.add_done_callback(lambda future: self._leave(request) if future.cancelled() else None)
        return request.future

    def close(self) -> None:
        """Take nothing more, and return when what was taken is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _waiting(self) -> int:
        return sum(request.tokens_left for request in self._queue)

    def _leave(self, request: _Request) -> None:
        with self._changed:
            if request in self._queue:
                self._queue.remove(request)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._score(batch)

    def _next_batch(self) -> list[tuple[_Request, list[Rendered]]]:
        """Rows for one call, by request; none when the queue is closed and empty."""
        with self._changed:
            while not (self._closed and not self._queue):
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._crowded and not self._closed:
                    self._changed.wait_for(lambda: self._is_full() or self._closed, timeout=LINGER)
                if self._queue:  # which a client that went away meanwhile may have emptied
                    return self._take()
            return []

    def _is_full(self) -> bool:
        return bool(self._queue) and self._waiting() >= self._queue[0].model.batch_tokens

    def _take(self) -> list[tuple[_Request, list[Rendered]]]:
        """Of the requests to one model in their order; those that are not done with go to the end of the queue."""
        model = self._queue[0].model
        left = model.batch_tokens
        batch: list[tuple[_Request, list[Rendered]]] = []
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

    def _score(self, batch: list[tuple[_Request, list[Rendered]]]) -> None:
        model = batch[0][0].model
        rendered = [each for _, rows in batch for each in rows]
        try:
            scores = iter(self._timed(model, rendered))
        except NonFiniteError:
            self._score_alone([request for request, _ in batch])
        except Exception as error:  # whatever it is, it is these requests' answer and not the thread's end
            for request, _ in batch:
                self._fail(request, error)
        else:
            for request, rows in batch:
                request.scores += [next(scores) for _ in rows]
                if len(request.scores) == len(request.rendered):
                    request.answer(request.scores)
        self._crowded = len(batch) > 1

    def _timed(self, model: Model, rendered: list[Rendered]) -> list[float]:
        """Scores of a batch, noted before anybody is answered: who then asks for metrics finds it there."""
        start = time.perf_counter()
        try:
            return model.score(rendered)
        finally:
            self._note(len(rendered), count_tokens(rendered), time.perf_counter() - start)

    def _score_alone(self, requests: list[_Request]) -> None:
        """Each request whole, so that the conversation at fault is named by its place in it and no other fails."""
        for request in requests:
            self._leave(request)
            if request.future.cancelled():
                continue
            try:
                request.answer(request.model.score(request.rendered))
            except Exception as error:
                self._fail(request, error)

    def _fail(self, request: _Request, error: Exception) -> None:
        self._leave(request)
        request.answer(error)

    def _note(self, conversations: int, tokens: int, seconds: float) -> None:
        self.batches += 1
        self._tokens_per_second += 0.2 * (tokens / max(seconds, 1e-6) - self._tokens_per_second)
        if self.on_batch is not None:
            self.on_batch(conversations, tokens, seconds)
