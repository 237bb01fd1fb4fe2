"""One piece of work at a time in a thread that has an owner, and whose failure can't be missed."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from splitlearn_core.messages import in_one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that does one thing at a time; `wait` says what came of it.

    The interpreter does not exit before it is done, and then logs a failure that nobody saw.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._threads: ThreadPoolExecutor | None = None
        self._work: Future[T] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something was begun that nobody has waited for."""
        return self._work is not None

    def begin(self, work: Callable[[], T]) -> None:
        """Begin; what was begun before must have been waited for."""
        if self._work is not None:
            raise RuntimeError("the work before was not waited for")
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, self._name)
            atexit.register(self._tell_at_exit)
        self._work = self._threads.submit(work)

    def wait(self) -> T | None:
        """Wait until what was begun is done; return what it returned, or raise what it raised."""
        if self._work is None:
            return None
        try:
            return self._work.result()
        finally:
            if self._work.done():  # not where the wait was interrupted
                self._work = None

    def close(self) -> None:
        """Let the thread end, after what it does now."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
            atexit.unregister(self._tell_at_exit)

    def _tell_at_exit(self) -> None:
        """Log a failure that nobody has heard of; the interpreter has waited for the thread."""
        error = self._work.exception() if self._work is not None else None
        if error is not None:
            logger.error("what was begun in the background failed: %s", in_one_line(error))


class Here(Executor):
    """Does everything in the calling thread, at once: where no other thread is to be had.

    That is so while the interpreter waits for its threads at its end, too.
    """

    def submit(self, fn: Callable[..., T], /, *given: Any, **named: Any) -> Future[T]:
        """Return what is done already."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*given, **named))
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)
        return future
