"""Beginning loads, reloads and unloads without waiting for them, and changing what holds."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING

import pytest
from manager_fakes import PATIENCE, until

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.core.async_model_manager import AsyncModelManager, ReloadPolicy
from splitlearn_manager.core.loads import LoadPolicy
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import (
    InsufficientResourcesError,
    ManagerClosedError,
    ModelFailedError,
    ModelLoadingError,
    ModelNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager_fakes import FakeLoader, Watch

    from splitlearn_manager.config import ModelConfig

    Config = Callable[..., ModelConfig]
    Make = Callable[..., AsyncModelManager]

pytestmark = pytest.mark.anyio

LIMITS = {
    "max_models": 5,
    "memory_limit": 1000,
    "eviction": False,
    "load_policy": LoadPolicy(),
    "memory_patience": 300.0,
}


async def test_an_ensured_load_can_be_begun_joined_and_waited_for(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    first = await manager.start_ensure(model_config())
    second = await manager.start_ensure(model_config())
    assert first is not None
    assert first is second
    held.release()

    assert (await first.outcome()).status is ModelStatus.READY
    assert await manager.start_ensure(model_config()) is None


async def test_a_reload_can_be_begun(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await manager.load_model(model_config())
    held = loader.hold("a")

    load = await (await manager.start_reload(model_config()))

    assert (await manager.get_model_info("a")).reloading
    with pytest.raises(ModelLoadingError):
        await manager.start_reload(model_config(), ReloadPolicy.UNLOAD_FIRST)
    held.release()
    assert (await load.outcome()).status is ModelStatus.READY


async def test_an_unload_can_be_begun_and_joined(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await manager.load_model(model_config())
    async with manager.use("a"):
        going = await manager.start_unload("a")
        assert going is not None
        assert going.status is ModelStatus.UNLOADING
        assert await manager.start_unload("a", 100) is going
    await going.gone()
    assert manager.models == {}

    loader.prepare("b", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config("b"))
    assert await manager.start_unload("b") is None
    with pytest.raises(ModelNotFoundError):
        await manager.start_unload("b")


async def test_no_more_loads_while_models_go_on_serving(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await manager.load_model(model_config("a"))
    await manager.load_model(model_config("b"))
    load, reload = loader.hold("late"), loader.hold("b")
    late = asyncio.create_task(manager.load_model(model_config("late")))
    newer = asyncio.create_task(manager.reload_model(model_config("b")))
    await load.started()
    await reload.started()

    await manager.stop_loading()
    load.release()
    reload.release()

    for ended in (late, newer):
        with pytest.raises(ManagerClosedError, match="shut down during the load"):
            await ended
    for begin in (manager.load_model, manager.ensure_model):
        with pytest.raises(ManagerClosedError, match="no more loads"):
            await begin(model_config("c"))
    with pytest.raises(ManagerClosedError, match="no more loads"):
        await manager.reload_model(model_config("a"))
    assert await manager.infer("a", 1) == 1
    assert await manager.infer("b", 1) == 1


async def test_a_subscription_loses_nothing_when_waiting_is_cancelled(
    manager: AsyncModelManager, model_config: Config
) -> None:
    with manager.subscribe() as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await manager.load_model(model_config())

        assert (await anext(events)).new is ModelStatus.LOADING  # type: ignore[union-attr]


async def test_time_to_live_is_changed_without_a_load(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    await manager.load_model(model_config(ttl=1000.0))

    await manager.adopt_config(model_config(pinned=True))
    assert (await manager.get_model_info("a")).pinned
    await manager.adopt_config(model_config(ttl=0.0))
    await watch.until("a", None)

    assert loader.loads == ["a"]


async def test_what_needs_a_load_is_not_adopted(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config())

    with pytest.raises(ValueError, match="'a' must be loaded again for that"):
        await manager.adopt_config(model_config(dtype="float16"))
    with pytest.raises(ModelNotFoundError):
        await manager.adopt_config(model_config("b"))
    assert await manager.ensure_model(model_config())


async def test_limits_hold_from_the_next_load_on(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config("a"))

    manager.set_limits(**{**LIMITS, "max_models": 1})
    with pytest.raises(InsufficientResourcesError, match="max_models is 1"):
        await manager.load_model(model_config("b"))
    manager.set_limits(**{**LIMITS, "memory_limit": 100})
    with pytest.raises(InsufficientResourcesError, match="may have 100 bytes"):
        await manager.load_model(model_config("b"))
    manager.set_limits(**{**LIMITS, "max_models": 1, "eviction": True})
    await manager.load_model(model_config("b"))

    # The one that made room may still be waiting for its memory to be back.
    found = await manager.list_models()
    assert [m.model_id for m in found if m.status is not ModelStatus.UNLOADING] == ["b"]
    with pytest.raises(ValueError, match="at least 1"):
        manager.set_limits(**{**LIMITS, "max_models": 0})
    with pytest.raises(ValueError, match="negative"):
        manager.set_limits(**{**LIMITS, "memory_limit": -1})


async def test_a_higher_limit_lets_in_who_waits(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["big"] = MemoryEstimate(950, 950)
    held = loader.hold("a")
    first = asyncio.create_task(manager.load_model(model_config("a")))
    await held.started()
    second = asyncio.create_task(manager.load_model(model_config("big")))
    await until(lambda: len(manager.resource_manager.on_change) == 1)
    await until(lambda: "big" in manager.models)

    manager.set_limits(**{**LIMITS, "memory_limit": 2000})

    assert await asyncio.wait_for(second, PATIENCE)
    held.release()
    assert await first


async def test_a_load_tells_how_long_it_took_and_waited(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    await manager.load_model(model_config())
    await manager.reload_model(model_config())
    loader.prepare("b", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config("b"))

    ends = [e for e in watch.events if e.new in {"ready", "failed"}]
    others = [e for e in watch.events if e.new not in {"ready", "failed"}]
    assert [(e.model_id, e.old, e.new) for e in ends] == [
        ("a", "loading", "ready"),
        ("a", "ready", "ready"),
        ("b", "loading", "failed"),
    ]
    assert all(0 <= e.queued_s <= e.load_s for e in ends)  # type: ignore[operator]
    assert all(e.load_s is None and e.queued_s is None for e in others)
    assert (await manager.get_model_info("a")).predicted_bytes == 60


async def test_a_failed_reload_is_observed(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    seen: list[str] = []
    manager.on_failed_reload.append(lambda event: seen.append(event.code))
    await manager.load_model(model_config())
    loader.prepare("a", OSError("disk"))

    with pytest.raises(ModelFailedError):
        await manager.reload_model(model_config())

    assert seen == ["storage"]


async def test_a_loading_thread_has_the_context_of_who_asked(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    """So that the logs of a load have the id of the request that began it."""
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[str] = []
    load = loader.load_from_config

    def note(*args: object) -> object:
        seen.append(who.get())
        return load(*args)  # type: ignore[arg-type]

    loader.load_from_config = note  # type: ignore[method-assign]
    who.set("a request")
    await manager.load_model(model_config())

    assert seen == ["a request"]
