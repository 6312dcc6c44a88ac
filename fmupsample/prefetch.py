"""Doing slow, independent work in threads ahead of the one who needs the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def prefetch(
    work: Callable[[A], R],
    items: Iterable[A],
    *,
    workers: int,
    ahead: int,
    begin: Callable[[], None] | None = None,
) -> Generator[tuple[A, R | None, Exception | None]]:
    """``(item, work(item), None)`` or ``(item, None, error)`` for each item, in order.

    At most ``ahead`` results are made before they are asked for, so memory stays bounded however
    slow the consumer is. With ``workers=0`` the work is done on the spot. Leaving the loop early
    (an error, Ctrl-C) drops what has not begun and does not wait for what has.

    Args:
        begin: called first in each thread.
    """
    if workers < 1:
        for item in items:
            yield _outcome(item, lambda item=item: work(item))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=begin)
    waiting: deque[tuple[A, Future[R]]] = deque()
    try:
        source = iter(items)
        while True:
            for item in islice(source, max(1, ahead) - len(waiting)):
                waiting.append((item, pool.submit(work, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield _outcome(item, future.result)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(item: A, result: Callable[[], R]) -> tuple[A, R | None, Exception | None]:
    try:
        return item, result(), None
    except Exception as error:
        return item, None, error
