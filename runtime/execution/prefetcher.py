"""Compute results in background threads, in order and a limited number of items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetcher(Iterator[Result], Generic[Item, Result]):
    """Iterate over `function(item)` in order, with at most `depth` results computed ahead.

    Items are taken from `items` in the consumer's thread, so prefetchers can be chained into a pipeline whose stages
    compute at the same time. An exception of `function` is raised when its result is taken. As a context manager it
    joins its threads on exit; without one, they end after the last result.
    """

    def __init__(self, function: Callable[[Item], Result], items: Iterable[Item], *, depth: int, threads: int = 1):
        """Start the first `depth` items. With a `depth` of 0, an item starts only when its result is requested."""
        self._function = function
        self._items = iter(items)
        self._depth = depth
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[Future[Result]] = deque()
        try:
            self._start_up_to(depth)
        except BaseException:  # raised by `items`, such as a prefetcher that this one is chained to
            self.close()
            raise

    def __enter__(self) -> Prefetcher[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Result:
        self._start_up_to(max(self._depth, 1))
        if not self._pending:
            self.close()
            raise StopIteration
        result = self._pending.popleft().result()
        self._start_up_to(self._depth)
        return result

    def close(self) -> None:
        """Cancel items that have not started, and wait for those that have."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start_up_to(self, count: int) -> None:
        while len(self._pending) < count:
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._pending.append(self._pool.submit(self._function, item))
