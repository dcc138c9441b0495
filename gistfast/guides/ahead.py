"""Work done ahead of its use, in other threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_ahead(pool: Executor, work: Callable[[T], R], items: Iterable[T], num_ahead: int) -> Iterator[R]:
    """The results of `work` for each item, in the order of the items.

    Up to `num_ahead` items are given to the pool before their result is asked for; items are drawn only then,
    so that memory stays bounded. What `work` raises is raised here. When the iteration ends early (an error,
    Ctrl-C, `close`), work that has not begun is cancelled.

    Args:
        pool: Where the work is done.
        work: Called once for each item.
        items: Any number of them.
        num_ahead: 1 keeps one thread busy; a pool of n threads wants about 2 n.
    """
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
