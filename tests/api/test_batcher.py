from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.batcher import BATCH_WAIT_SECONDS, Batcher, ServerBusyError, ServerStoppingError
from runtime.common.errors import NonFiniteError
from runtime.conversations.rendering import RenderedConversation
from runtime.scorer import ScoreResult

BAD, BROKEN = 99, 98


def rows(*lengths: int) -> list[RenderedConversation]:
    return [RenderedConversation([0] * length, length - 1) for length in lengths]


class Lengths:
    """Scores a conversation by its length."""

    def __init__(self, batch_tokens: int = 100):
        self.batch_tokens = batch_tokens
        self.calls: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def score(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        lengths = [len(each.token_ids) for each in rendered]
        self.calls.append(lengths)
        self.entered.set()
        assert self.open.wait(30)
        if BROKEN in lengths:
            raise RuntimeError("broken")
        return [NonFiniteError("not finite") if length == BAD else float(length) for length in lengths]

    def hold(self, batcher: Batcher) -> None:
        """Block the scoring thread in a call, so that the next requests stay in the queue."""
        self.open.clear()
        batcher.submit(self, rows(1))
        assert self.entered.wait(30)
        self.calls.clear()


@given(st.lists(st.lists(st.integers(1, 90), max_size=9), max_size=9), st.integers(1, 150))
def test_each_request_gets_its_own_scores_in_order(requests, batch_tokens):
    model, batcher = Lengths(batch_tokens), Batcher()
    futures = [batcher.submit(model, rows(*lengths)) for lengths in requests]
    assert [future.result(30) for future in futures] == requests
    assert all(sum(call) <= batch_tokens or len(call) == 1 for call in model.calls)
    assert batcher.waiting_requests == batcher.waiting_tokens == 0
    batcher.close()


def test_waiting_requests_share_batches_and_a_long_request_is_split():
    model, batcher = Lengths(100), Batcher()
    model.hold(batcher)
    futures = [batcher.submit(model, rows(*lengths)) for lengths in ([60, 60, 60], [30, 30], [50])]
    model.open.set()
    wait(futures)
    assert model.calls == [[60, 30], [50, 30], [60], [60]]


def test_two_models_take_turns():
    first, second, batcher = Lengths(), Lengths(), Batcher()
    first.hold(batcher)
    futures = [batcher.submit(model, rows(length)) for length, model in ((1, first), (2, second), (3, first))]
    first.open.set()
    assert [future.result(30) for future in futures] == [[1], [2], [3]]
    assert (first.calls, second.calls) == ([[1, 3]], [[2]])


def test_a_full_queue_rejects_requests():
    model, batcher = Lengths(), Batcher(queue_tokens=100)
    model.hold(batcher)
    taken = [batcher.submit(model, rows(500)), batcher.submit(model, [])]  # an empty queue takes any size
    with pytest.raises(ServerBusyError, match="500 tokens wait, this request adds 1, and the limit is 100") as busy:
        batcher.submit(model, rows(1))
    assert 1 <= busy.value.retry_after <= 60
    model.open.set()
    assert [future.result(30) for future in taken] == [[500.0], []]
    assert batcher.submit(model, rows(7)).result(30) == [7.0]


def test_a_cancelled_request_leaves_the_queue_unscored():
    model, batcher = Lengths(), Batcher(queue_tokens=100)
    model.hold(batcher)
    gone = batcher.submit(model, rows(80))
    with pytest.raises(ServerBusyError):
        batcher.submit(model, rows(70))
    assert gone.cancel()
    stays = batcher.submit(model, rows(70))
    model.open.set()
    assert stays.result(30) == [70.0]
    assert model.calls == [[70]]
    with pytest.raises(CancelledError):
        gone.result(30)


def test_a_request_cancelled_between_its_batches_is_not_continued():
    model, batcher = Lengths(batch_tokens=10), Batcher()
    model.open.clear()
    future = batcher.submit(model, rows(9, 9, 9, 9))
    assert model.entered.wait(30)
    assert future.cancel()
    model.open.set()
    batcher.close()
    assert model.calls == [[9]]


def test_a_non_finite_score_fails_only_its_request():
    model, batcher = Lengths(), Batcher()
    model.hold(batcher)
    good, bad, also_good = (batcher.submit(model, rows(*lengths)) for lengths in ([5], [6, BAD], [7]))
    model.open.set()
    assert (good.result(30), also_good.result(30)) == ([5.0], [7.0])
    with pytest.raises(NonFiniteError, match="conversation 1: not finite"):  # counted within the request
        bad.result(30)


def test_each_result_of_a_request_may_be_an_error():
    model, batcher = Lengths(batch_tokens=10), Batcher()
    model.hold(batcher)
    mixed, plain = batcher.submit_each(model, rows(3, BAD, 5)), batcher.submit(model, rows(4))
    model.open.set()
    first, bad, last = mixed.result(30)
    assert (first, last, plain.result(30)) == (3.0, 5.0, [4.0])
    assert isinstance(bad, NonFiniteError) and str(bad) == "not finite"


def test_nothing_is_scored_twice_for_an_error():
    model, batcher = Lengths(batch_tokens=1000), Batcher()
    model.hold(batcher)
    futures = [batcher.submit(model, rows(*lengths)) for lengths in ([5, BAD], [7], [BAD])]
    model.open.set()
    wait(futures)
    assert model.calls == [[5, BAD, 7, BAD]]


def test_a_long_request_that_fails_leaves_the_queue():
    model, batcher = Lengths(batch_tokens=100), Batcher()
    bad = batcher.submit(model, rows(50, BAD, 50))
    with pytest.raises(NonFiniteError, match="conversation 1: not finite"):
        bad.result(30)
    assert batcher.submit(model, rows(3)).result(30) == [3.0]
    assert batcher.waiting_requests == 0


def test_any_other_error_fails_its_request_and_not_the_thread():
    model, batcher = Lengths(), Batcher()
    with pytest.raises(RuntimeError, match="broken"):
        batcher.submit(model, rows(BROKEN)).result(30)
    assert batcher.submit(model, rows(4)).result(30) == [4.0]


def test_close_answers_queued_requests_and_rejects_new_ones():
    model, batcher = Lengths(batch_tokens=10), Batcher()
    model.hold(batcher)
    futures = [batcher.submit(model, rows(9)) for _ in range(20)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(ServerStoppingError, match="stopping"):
        while True:
            batcher.submit(model, [*rows(1)])
    model.open.set()
    closing.join(30)
    assert all(future.result(0) == [9.0] for future in futures)


def test_a_cancellation_during_the_batch_wait_does_not_stop_the_thread():
    model, batcher = Lengths(), Batcher()
    for _ in range(5):
        model.hold(batcher)
        several = [batcher.submit(model, rows(2)) for _ in range(3)]  # after a shared batch the thread waits
        model.open.set()
        wait(several, 30)
        gone = batcher.submit(model, rows(3))
        time.sleep(BATCH_WAIT_SECONDS / 5)
        gone.cancel()
        time.sleep(2 * BATCH_WAIT_SECONDS)  # no other request arrives
    assert batcher.submit(model, rows(5)).result(30) == [5.0]
    batcher.close()
