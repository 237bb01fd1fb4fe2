"""A thread pool whose threads never keep the process alive.

The standard library's `ThreadPoolExecutor` is joined when the interpreter exits, so that a load
that hangs in a file system or a driver would hang the exit too.  A thread can't be ended from
outside; what can be chosen is that nobody waits for it.

Not at all would be too little: the interpreter ends a thread that comes back to it during its own
end, and where that thread is in torch's code, the process aborts.  So at the exit calls that run
are told to end, and waited for, a moment.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import threading
import time
from concurrent.futures import Executor, Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from splitlearn_manager.core.doorbell import doorbell_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.core.doorbell import Doorbell

P = ParamSpec("P")
T = TypeVar("T")

EXIT_GRACE = 1.0
"""Seconds for which the exit of the interpreter waits for calls that run."""

_executors: WeakSet[DaemonThreadPoolExecutor] = WeakSet()


class Answer(Protocol):
    """What a call settles: a `concurrent.futures.Future`, or what stands for one."""

    def set_running_or_notify_cancel(self) -> bool:
        """Return whether the call is still wanted; it begins now."""

    def set_result(self, result: Any, /) -> None:
        """Hear what it returned."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Hear what it raised."""


_Work = tuple[Answer, "Callable[..., Any]", tuple[Any, ...], dict[str, Any]]


class DaemonThreadPoolExecutor(Executor):
    """At most `max_workers` daemon threads, started when there is work for them.

    What is queued when the interpreter exits is not run.  What runs then gets a `SystemExit` at its
    next step of Python, and is abandoned where it stands after `EXIT_GRACE` seconds.
    """

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, found {max_workers}")
        self._max_workers = max_workers
        self._prefix = thread_name_prefix
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False
        _executors.add(self)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call; its result, or whatever it raises, settles the future.

        Raises:
            RuntimeError: The executor was shut down, or has no thread and can't start one.
        """
        future: Future[T] = Future()
        self._queue_up((future, fn, args, kwargs))
        return future

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Queue a call, and wait for its result on the event loop.

        A caller that is cancelled goes away at once: a call that still waits for its turn is then
        not run, one that runs goes on, and its result is dropped.  Takes half the time of waiting
        for `submit`'s future.

        Raises:
            RuntimeError: As `submit`; or the call raised `StopIteration`, or no `Exception` at all:
                neither may pass through an event loop.
            Exception: What the call raised.
        """
        loop = asyncio.get_running_loop()
        answer = _LoopAnswer(loop.create_future(), doorbell_of(loop))
        self._queue_up((answer, fn, args, kwargs))
        result: T = await answer.future
        return result

    def _queue_up(self, work: _Work) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the executor was shut down")
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_workers:
                self._start_thread()  # first: if it can't be started, nothing is queued
            self._queue.put(work)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and let each thread end after what is queued before this call.

        Args:
            wait: Return only when the threads have ended.
            cancel_futures: Cancel what is queued and not yet running.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                if cancel_futures:
                    self._cancel_queued()
                for _ in self._threads:
                    self._queue.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def abandon(self) -> list[threading.Thread]:
        """Run nothing more, and end what runs where that can be; return the threads.

        For the end of the interpreter: what is queued is not even cancelled, as nobody waits.
        """
        with self._lock:
            self._closed = True
            with suppress(Empty):
                while True:
                    self._queue.get_nowait()
            for thread in self._threads:
                self._queue.put(None)
                _raise_in(thread, SystemExit)
            return list(self._threads)

    def _start_thread(self) -> None:
        """Start one more thread; where the system has none left, those that there are must do."""
        name = f"{self._prefix}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def _cancel_queued(self) -> None:
        """Take the queued work away from the threads."""
        with suppress(Empty):
            while (work := self._queue.get_nowait()) is not None:
                answer = work[0]
                if isinstance(answer, Future):
                    answer.cancel()
                else:
                    answer.set_exception(RuntimeError("the executor was shut down"))

    def _run(self) -> None:
        """Do what is queued, until told to end."""
        while (work := self._queue.get()) is not None:
            _do(*work)
            del work  # what was loaded must not live on in an idle thread
            self._idle.release()


class _LoopAnswer:
    """Settles a future of an event loop, from another thread."""

    __slots__ = ("_bell", "future")

    def __init__(self, future: asyncio.Future[Any], bell: Doorbell) -> None:
        self._bell = bell
        self.future = future

    def set_running_or_notify_cancel(self) -> bool:
        """Return whether somebody still waits."""
        return not self.future.cancelled()

    def set_result(self, result: Any, /) -> None:
        """Pass the result on."""
        self._bell.call(_settle, self.future, result)

    def set_exception(self, exception: BaseException, /) -> None:
        """Pass the error on."""
        self._bell.call(_fail, self.future, _presentable(exception))


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _presentable(error: BaseException) -> Exception:
    """Return an error that an event loop passes on, and that does not end it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError(f"a call in a worker thread ended with {error!r}")
    wrapped.__cause__ = error
    return wrapped


def _do(
    future: Answer,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Settle a future with its call's result."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - it is the future's, as in the standard library
        future.set_exception(error)
        del future, error  # the traceback leads to this frame: a cycle that keeps the future
    else:
        future.set_result(result)


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Let a thread raise an error at its next step of Python; nothing, if it has ended."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(error)
        )


def _end_threads(seconds: float = EXIT_GRACE) -> None:
    """End the threads of all executors, as far as that goes in time."""
    threads = [thread for executor in tuple(_executors) for thread in executor.abandon()]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(_end_threads)
