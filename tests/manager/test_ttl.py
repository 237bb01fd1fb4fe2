from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from manager_fakes import FakeLoader, Watch, until

from splitlearn_manager.core.states import ModelStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio

LONG = 1000.0
SHORT = 0.02


class Clock:
    """Says what time it is, as the test wants it, beside the real one."""

    def __init__(self, manager: AsyncModelManager) -> None:
        self.ahead = 0.0
        self._real = manager._idle._clock
        manager._idle._clock = lambda: self._real() + self.ahead


def look(manager: AsyncModelManager, model_id: str = "a") -> None:
    """Let the time to live be looked at now."""
    managed = manager.models[model_id]
    assert managed.timer is not None
    manager._idle._look(managed)


async def test_what_nobody_uses_goes(
    manager: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    await manager.load_model(model_config(ttl=SHORT))
    await until(lambda: manager.models == {})

    going = watch.events[-2]
    assert going.new is ModelStatus.UNLOADING
    assert (going.reason, going.code) == ("nobody used it for 0.02 s", "idle")


async def test_each_use_begins_the_time_anew(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config(ttl=LONG))
    clock = Clock(manager)
    first = manager.models["a"].timer
    manager.models["a"].idle_since -= LONG - 1
    await manager.infer("a", 1)
    assert first.cancelled()

    clock.ahead = LONG - 1
    look(manager)
    assert manager.models["a"].status is ModelStatus.READY
    clock.ahead = LONG + 1
    look(manager)
    assert manager.models["a"].status is ModelStatus.UNLOADING
    await until(lambda: manager.models == {})


async def test_what_is_in_use_stays_and_goes_later(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config(ttl=LONG))
    async with manager.use("a") as managed:
        await manager.adopt_config(model_config(ttl=SHORT))
        managed.idle_since -= LONG
        manager._idle._look(managed)
        assert managed.status is ModelStatus.READY

    await until(lambda: manager.models == {})


async def test_what_a_session_holds_stays(manager: AsyncModelManager, model_config: Config) -> None:
    await manager.load_model(model_config(ttl=LONG))
    managed = await manager.get_model("a")
    assert managed is not None
    hold = managed.hold(lambda _: None)
    managed.idle_since -= LONG

    manager._idle._look(managed)
    assert managed.status is ModelStatus.READY
    hold.release()
    assert managed.timer is not None


async def test_a_reload_is_waited_for_and_the_new_one_has_its_own_time(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await manager.load_model(model_config(ttl=LONG))
    old = manager.models["a"]
    held = loader.hold("a")
    reload = asyncio.create_task(manager.reload_model(model_config()))
    await held.started()
    old.idle_since -= 2 * LONG
    look(manager)
    assert old.status is ModelStatus.READY
    held.release()
    await reload

    assert old.timer is None
    assert manager.models["a"].timer is None  # the new configuration has no time to live
    manager._idle._look(old)
    await old.gone()
    assert await manager.infer("a", 1) == 1


async def test_an_unload_ends_the_timer(manager: AsyncModelManager, model_config: Config) -> None:
    await manager.load_model(model_config(ttl=LONG))
    managed = manager.models["a"]
    timer = managed.timer

    await manager.unload_model("a")

    assert timer.cancelled()
    assert managed.timer is None


async def test_a_shutdown_ends_every_timer(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config("a", ttl=LONG))
    await manager.load_model(model_config("b", ttl=LONG))
    timers = [entry.timer for entry in manager.models.values()]

    await manager.shutdown()

    assert all(timer.cancelled() for timer in timers)


async def test_a_clock_that_people_set_back_or_forward_unloads_nothing(
    manager: AsyncModelManager, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    await manager.load_model(model_config(ttl=LONG))
    for jump in (-1e9, 1e9):
        monkeypatch.setattr("time.time", lambda jump=jump: 1.8e9 + jump)
        await manager.infer("a", 1)
        look(manager)
        assert manager.models["a"].status is ModelStatus.READY


async def test_without_a_time_to_live_there_is_no_timer(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config("a"))
    await manager.load_model(model_config("b", pinned=True))

    assert [entry.timer for entry in manager.models.values()] == [None, None]


async def test_check_alive_fails_when_the_table_is_stuck(manager: AsyncModelManager) -> None:
    await manager.check_alive()
    async with manager.lock:
        with pytest.raises(TimeoutError):
            await manager.check_alive(0.01)
    await manager.check_alive()
