"""Prefetched results are in order, limited in depth, and leave no thread behind."""

from __future__ import annotations

import threading
import time

import pytest

from runtime.execution.prefetcher import Prefetcher


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (1, 1), (2, 1), (5, 3), (100, 4)])
def test_results_are_in_order_whoever_is_first(depth, threads):
    before = threading.active_count()

    def slow_when_early(item: int) -> int:
        time.sleep(0.002 * (5 - item % 5))
        return item * item

    with Prefetcher(slow_when_early, range(20), depth=depth, threads=threads) as results:
        assert list(results) == [item * item for item in range(20)]
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_nothing_is_begun_further_ahead(depth):
    begun = []
    with Prefetcher(begun.append, range(9), depth=depth) as results:
        for taken in range(1, 9):
            next(results)
            assert len(begun) <= taken + depth
    assert begun == list(range(len(begun)))


def test_one_over_another_keeps_both_threads_busy():
    """The first stage ends an item only while the second is at an earlier one: in turns, they would wait forever."""
    meeting = threading.Barrier(2, timeout=10)

    def first(item: int) -> int:
        if item >= 2:
            meeting.wait()
        return item

    def second(item: int) -> int:
        if item < 6:
            meeting.wait()
        return item

    with Prefetcher(first, range(8), depth=2) as between, Prefetcher(second, between, depth=2) as results:
        assert list(results) == list(range(8))


def test_an_error_comes_where_its_result_would():
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    before = threading.active_count()
    taken = []
    with pytest.raises(ValueError, match="three"), Prefetcher(fail_at_three, range(9), depth=2) as results:
        for result in results:
            taken.append(result)
    assert taken == [0, 1, 2] and threading.active_count() == before


def test_an_error_of_the_first_ends_the_second_even_as_it_is_made():
    def fail(item: int) -> int:
        raise ValueError(f"{item}")

    before = threading.active_count()
    with pytest.raises(ValueError, match="0"), Prefetcher(fail, range(9), depth=2) as between:
        Prefetcher(str, between, depth=2)
    assert threading.active_count() == before


def test_leaving_early_begins_nothing_more():
    begun = []
    before = threading.active_count()
    with Prefetcher(begun.append, range(1000), depth=3) as results:
        next(results)
    assert len(begun) <= 4 and threading.active_count() == before
