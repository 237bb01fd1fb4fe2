"""Doing the next few jobs while the result of one is put to use.

Copying a tensor is mostly waiting: for a disk, and for the system to find memory.  Two copies at
once take about half the time of one after the other, on a machine with two cores or more (measured
with `splitlearn bench load`); more bring nothing.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

AT_ONCE = 2
"""Jobs that run, or are done and wait to be used, at any time."""


def ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of `jobs`, in their order; up to `AT_ONCE` of them are under way.

    The jobs run in threads that end with the iteration, also where it is broken off; `jobs` itself
    is iterated in the caller's thread.  What a job raises is raised in its turn.
    """
    with ThreadPoolExecutor(AT_ONCE, "splitlearn-copy") as threads:
        under_way: deque[Future[T]] = deque()
        try:
            for job in jobs:
                under_way.append(threads.submit(job))
                if len(under_way) == AT_ONCE:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
