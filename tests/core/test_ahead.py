"""Jobs that are done a little ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from splitlearn_core.loading.ahead import AT_ONCE, ahead


def test_results_come_in_order() -> None:
    assert list(ahead(partial(int, n) for n in range(20))) == list(range(20))
    assert list(ahead([])) == []


def test_jobs_run_beside_each_other_and_no_more_than_that() -> None:
    together = threading.Barrier(AT_ONCE)
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        together.wait(30)  # breaks, and so fails, unless as many run at once
        return number

    results = ahead(partial(job, n) for n in range(2 * AT_ONCE))

    assert next(results) == 0
    assert len(begun) <= AT_ONCE + 1
    assert list(results) == [1, 2, 3]


def test_an_error_comes_in_its_turn_and_leaves_no_thread() -> None:
    def fail() -> int:
        raise OSError("disk")

    results = ahead([lambda: 1, fail, lambda: 3])

    assert next(results) == 1
    with pytest.raises(OSError, match="disk"):
        next(results)
    _check_no_thread()


def test_breaking_off_opens_nothing_more_and_leaves_no_thread() -> None:
    opened: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for number in range(100):
            opened.append(number)
            yield partial(int, number)

    results = ahead(jobs())
    next(results)
    results.close()  # type: ignore[attr-defined]  # a generator

    assert len(opened) <= AT_ONCE + 1
    _check_no_thread()


def _check_no_thread() -> None:
    assert not [t for t in threading.enumerate() if t.name.startswith("splitlearn-copy")]
