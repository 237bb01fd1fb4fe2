"""Calls from worker threads into an event loop, and into one that is closed by then."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from manager_fakes import PATIENCE

from splitlearn_manager.core.doorbell import (
    Doorbell,
    EventDoorbell,
    PlainDoorbell,
    doorbell_of,
    in_loop,
)
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPS = [
    pytest.param(asyncio.new_event_loop, id="asyncio"),
    pytest.param(uvloop.new_event_loop, id="uvloop"),
]
needs_events = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="the system has no eventfd")


@pytest.fixture(params=["event", pytest.param("plain")])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """Have doorbells of one kind."""
    if request.param == "plain":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("the system has no eventfd")
    return PlainDoorbell if request.param == "plain" else EventDoorbell


@pytest.mark.anyio
async def test_calls_come_in_order_in_the_loops_thread(kind: type[Any]) -> None:
    bell = doorbell_of(asyncio.get_running_loop())
    assert isinstance(bell, kind)
    seen: list[tuple[int, int]] = []
    done = asyncio.Event()

    def ring() -> None:
        for number in range(1000):
            bell.call(lambda n: seen.append((n, threading.get_ident())), number)
        bell.call(done.set)

    thread = threading.Thread(target=ring)
    thread.start()
    async with asyncio.timeout(PATIENCE):
        await done.wait()
    thread.join()

    assert seen == [(n, threading.get_ident()) for n in range(1000)]


@needs_events
@pytest.mark.anyio
async def test_a_loop_has_one() -> None:
    assert doorbell_of(asyncio.get_running_loop()) is doorbell_of(asyncio.get_running_loop())


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.parametrize("work", ["run", "in_loop"])
def test_a_call_that_ends_after_its_loop_was_closed_tells_nobody(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    work: str,
    kind: type[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    del kind
    entered, closed = threading.Event(), threading.Event()
    executor = DaemonThreadPoolExecutor(1, "late")

    def late() -> str:
        entered.set()
        assert closed.wait(PATIENCE)
        return "nobody hears of it"

    async def leave() -> None:
        if work == "run":
            waiting: asyncio.Future[Any] = asyncio.ensure_future(executor.run(late))
        else:
            waiting = in_loop(executor.submit(late))
        await asyncio.to_thread(entered.wait, PATIENCE)
        assert not waiting.done()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(leave())
    closed.set()
    executor.shutdown()

    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@needs_events
@pytest.mark.parametrize("new_loop", LOOPS)
def test_its_descriptor_is_there_as_long_as_somebody_can_ring(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    loop = new_loop()
    bell: Doorbell | None = doorbell_of(loop)
    assert isinstance(bell, EventDoorbell)
    descriptor, gone = bell._event, weakref.ref(bell)
    loop.close()

    bell.call(print, "too late")
    assert os.fstat(descriptor)

    bell = None
    gc.collect()
    assert gone() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@needs_events
@pytest.mark.parametrize("new_loop", LOOPS)
def test_what_nobody_came_to_hear_keeps_no_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    loop = new_loop()
    bell = doorbell_of(loop)
    assert isinstance(bell, EventDoorbell)
    bell.call(loop.create_future().set_result, None)
    loop.close()
    gone = weakref.ref(bell)

    del bell, loop
    gc.collect()
    assert gone() is None


@pytest.mark.anyio
async def test_a_future_ends_as_the_other_does(kind: type[Any]) -> None:
    del kind
    good, bad, dropped, left = Future[int](), Future[int](), Future[int](), Future[int]()
    outcomes = [in_loop(future) for future in (good, bad, dropped, left)]
    good.set_result(7)
    bad.set_exception(ZeroDivisionError())
    dropped.cancel()
    dropped.set_running_or_notify_cancel()
    outcomes[3].cancel()
    await asyncio.wait(outcomes, timeout=PATIENCE)

    assert outcomes[0].result() == 7
    assert isinstance(outcomes[1].exception(), ZeroDivisionError)
    assert outcomes[2].cancelled()
    assert not left.cancelled()
    left.set_result(1)


@needs_events
@pytest.mark.anyio
async def test_without_a_descriptor_to_be_had_there_is_the_plain_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(*_: int) -> int:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, "eventfd", none_left)
    loop = asyncio.new_event_loop()
    try:
        assert isinstance(doorbell_of(loop), PlainDoorbell)
    finally:
        loop.close()
