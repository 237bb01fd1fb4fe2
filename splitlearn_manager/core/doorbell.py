"""How other threads call into an event loop: the one place where they do.

A loop may be closed while a worker thread is still at something that nobody waits for any more.
What it then has to say is said to nobody, here, whatever loop it was: no call is made into a loop
that is closing.

`call_soon_threadsafe` of uvloop wakes the loop's thread while the caller has the interpreter's lock
(GIL), which the thread then waits for, to be woken a second time.  Writing to an event descriptor
lets go of that lock, so that the loop goes on as soon as it is woken.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")


class Doorbell(Protocol):
    """Calls functions in the thread of one event loop, in the order in which they come."""

    def call(self, fn: Callable[..., None], /, *args: Any) -> None:
        """Have a function called that must not raise; from any thread, and never if it is late."""


class EventDoorbell:
    """A queue, and an event descriptor that the loop watches.

    The loop keeps it until it is closed, and who rings keeps it as well: the descriptor is closed
    when neither does, so that nobody can write to a number that means another file by then.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._event, self._answer)

    def call(self, fn: Callable[..., None], /, *args: Any) -> None:
        """Queue a call, and wake the loop."""
        self._calls.append((fn, args))
        os.eventfd_write(self._event, 1)

    def _answer(self) -> None:
        """Make all calls that are queued.  Looking at the event comes first: none is missed."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        while self._calls:
            fn, args = self._calls.popleft()
            fn(*args)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._event)


class PlainDoorbell:
    """For systems without event descriptors, and loops that can't watch one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call(self, fn: Callable[..., None], /, *args: Any) -> None:
        """Queue a call, and wake the loop."""
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(fn, *args)


# The loop itself keeps its doorbell: what is queued in one leads back to the loop, and would keep
# both if it were kept here.
_doorbells: WeakKeyDictionary[asyncio.AbstractEventLoop, ref[EventDoorbell]] = WeakKeyDictionary()


def doorbell_of(loop: asyncio.AbstractEventLoop) -> Doorbell:
    """Return a loop's doorbell; in the loop's own thread."""
    known = _doorbells.get(loop)
    bell = None if known is None else known()
    return _new_doorbell(loop) if bell is None else bell


def _new_doorbell(loop: asyncio.AbstractEventLoop) -> Doorbell:
    """Return the best that a system and a loop have."""
    if not hasattr(os, "eventfd"):
        return PlainDoorbell(loop)
    try:
        bell = EventDoorbell(loop)
    except (NotImplementedError, OSError):  # no such loop; no descriptor to be had
        return PlainDoorbell(loop)
    _doorbells[loop] = ref(bell)
    return bell


def in_loop(future: Future[T]) -> asyncio.Future[T]:
    """Return a future of the running loop that ends as another thread's does.

    Unlike `asyncio.wrap_future`, cancelling it leaves the other one alone, and a loop that is
    closed by then is not called.
    """
    loop = asyncio.get_running_loop()
    bell, outcome = doorbell_of(loop), loop.create_future()
    future.add_done_callback(lambda done: bell.call(_copy, done, outcome))
    return outcome


def _copy(done: Future[Any], outcome: asyncio.Future[Any]) -> None:
    """Let a future end as another has."""
    if outcome.done():
        return
    if done.cancelled():
        outcome.cancel()
    elif (error := done.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())
