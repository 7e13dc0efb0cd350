"""Results computed by other threads before they are asked for, in order and only so far ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lookahead(Iterator[Result], Generic[Item, Result]):
    """`function(item)` for each item, in order, at most `depth` of them begun before they are asked for.

    Reads blocks while others compute, and chains into a pipeline: one over another keeps both their threads busy.
    Items are drawn in the thread that asks. As a context it ends with its threads gone, whatever happened; without one,
    they go when the last result was taken. What `function` raises is raised where its result is asked for.
    """

    def __init__(self, function: Callable[[Item], Result], items: Iterable[Item], *, depth: int, threads: int = 1):
        """With a `depth` of 0 nothing is done before it is asked for."""
        self._function = function
        self._items = iter(items)
        self._depth = depth
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[Future[Result]] = deque()
        try:
            self._begin(depth)
        except BaseException:  # of one that this one is over
            self.close()
            raise

    def __enter__(self) -> Lookahead[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Result:
        self._begin(max(self._depth, 1))
        if not self._pending:
            self.close()
            raise StopIteration
        result = self._pending.popleft().result()
        self._begin(self._depth)
        return result

    def close(self) -> None:
        """Begin nothing more, and wait for what is being done."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, count: int) -> None:
        while len(self._pending) < count:
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._pending.append(self._pool.submit(self._function, item))
