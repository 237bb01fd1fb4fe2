"""Leases and drains: what keeps a model, and how that ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import Watch, until

from splitlearn_manager.core.entries import AsyncManagedModel
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import DrainTimeoutError, ManagerError, ModelUnloadingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.lease import Hold

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


@pytest.fixture
async def managed(manager: AsyncModelManager, model_config: Config) -> AsyncManagedModel:
    """Return the model `a`, loaded."""
    await manager.load_model(model_config())
    found = await manager.get_model("a")
    assert found is not None
    return found


async def test_a_hold_keeps_a_model_and_is_no_request(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    hold = managed.hold(lambda _: None)
    unload = asyncio.create_task(manager.unload_model("a"))
    await until(lambda: managed.status is ModelStatus.UNLOADING)

    info = await manager.get_model_info("a")
    assert (info.in_flight, info.request_count) == (0, 0)
    assert not unload.done()
    hold.release()
    hold.release()

    assert await unload is True


async def test_at_the_deadline_a_hold_is_told_once_and_waited_for(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    told: list[ManagerError] = []
    hold = managed.hold(told.append)
    unload = asyncio.create_task(manager.unload_model("a", drain_timeout=0))
    await until(lambda: told != [])
    assert not unload.done()
    assert manager.models["a"] is managed

    hold.end(told[0])
    hold.release()

    assert await unload is True
    assert len(told) == 1
    assert isinstance(told[0], DrainTimeoutError)


async def test_a_hold_that_lets_go_within_the_call_ends_the_drain_at_once(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    holds: dict[int, Hold] = {}
    for number in range(3):
        holds[number] = managed.hold(lambda _, number=number: holds.pop(number).release())

    assert await manager.unload_model("a", drain_timeout=0) is True
    assert holds == {}


async def test_who_holds_a_model_may_use_it_while_it_is_drained(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    hold = managed.hold(lambda _: None)
    unload = asyncio.create_task(manager.unload_model("a"))
    await until(lambda: managed.status is ModelStatus.UNLOADING)

    async with managed.use() as mine:
        assert await mine(4) == 4
        hold.release()
        assert not unload.done()  # the use alone keeps it

    assert await unload is True


async def test_after_the_deadline_nobody_gets_it(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    ended = asyncio.Event()
    hold = managed.hold(lambda _: ended.set())
    unload = asyncio.create_task(manager.unload_model("a", drain_timeout=0))
    await ended.wait()

    with pytest.raises(ModelUnloadingError, match="model 'a' was unloaded"):
        async with managed.use():
            pass
    hold.release()
    assert await unload is True


async def test_a_use_is_for_one_block(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    use = manager.use("a")
    async with use:
        with pytest.raises(RuntimeError, match="has begun already"):
            async with use:
                pass
    assert managed.in_flight == 0


async def test_two_uses_in_one_task_both_end(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    async def nested() -> None:
        async with manager.use("a"), manager.use("a"):
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    task = asyncio.create_task(nested())
    await begun.wait()

    assert await manager.unload_model("a", drain_timeout=0) is True
    with pytest.raises(DrainTimeoutError):
        await task
    assert task.cancelling() == 0
    assert managed.in_flight == 0


async def test_a_block_that_fails_by_itself_at_the_deadline_fails_with_that(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    async def use() -> None:
        async with manager.use("a"):
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise ZeroDivisionError

    begun = asyncio.Event()
    task = asyncio.create_task(use())
    await begun.wait()

    assert await manager.unload_model("a", drain_timeout=0) is True
    with pytest.raises(ZeroDivisionError):
        await task
    assert task.cancelling() == 0
    assert managed.is_idle


async def test_a_block_that_unloads_its_own_model_is_told(
    manager: AsyncModelManager, managed: AsyncManagedModel, watch: Watch
) -> None:
    with pytest.raises(DrainTimeoutError):
        async with manager.use("a"):
            await manager.unload_model("a", drain_timeout=0)

    await until(lambda: manager.models == {})
    assert watch.moves("a")[-1] == ("unloading", None)
    assert managed.unreturned_bytes == 0


async def test_a_cancelled_caller_that_is_also_ended_is_cancelled(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    async def use() -> None:
        async with manager.use("a"):
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    task = asyncio.create_task(use())
    await begun.wait()
    managed.cut("the deadline")
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_deadline_can_only_come_nearer(
    manager: AsyncModelManager, managed: AsyncManagedModel
) -> None:
    ended: list[Any] = []
    hold = managed.hold(ended.append)
    unloads = [asyncio.create_task(manager.unload_model("a", drain_timeout=s)) for s in (50, 90)]
    await until(lambda: managed.drain is not None)
    await asyncio.sleep(0)
    assert managed.drain is not None
    first = managed.drain._deadline

    managed.drain.shorten(None)
    managed.drain.shorten(70)
    assert managed.drain._deadline == first
    managed.drain.shorten(10)
    assert managed.drain._deadline < first
    assert ended == []

    hold.release()
    assert await asyncio.gather(*unloads) == [True, True]
