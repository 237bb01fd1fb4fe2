from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest
from manager_fakes import PATIENCE, FakeLoader, Watch, until

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.core.states import LoadPhase, ModelStatus
from splitlearn_manager.errors import (
    ConfigError,
    InsufficientResourcesError,
    LoadCancelledError,
    ManagerClosedError,
    ModelAlreadyLoadedError,
    ModelFailedError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager

    Config = Callable[..., ModelConfig]
    Make = Callable[..., AsyncModelManager]

pytestmark = pytest.mark.anyio


@pytest.fixture
async def loaded(manager: AsyncModelManager, model_config: Config) -> AsyncModelManager:
    """Return a manager with the model `a`."""
    await manager.load_model(model_config())
    return manager


def kept(manager: AsyncModelManager) -> dict[str, int]:
    """Return what is reserved, by model."""
    return dict(manager.resource_manager.get_current_usage().reservations)


async def test_a_request_ends_on_the_old_and_the_next_gets_the_new(
    loaded: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    async with loaded.use("a") as old:
        assert await loaded.reload_model(model_config(dtype="float16")) is True
        async with loaded.use("a") as new:
            assert new is not old
            assert new.config.dtype == "float16"
            assert await old(1) == 1
            assert await new(2) == 2
        assert old.status is ModelStatus.UNLOADING
        assert kept(loaded) == {"a": 120}
    await old.gone()

    assert kept(loaded) == {"a": 60}
    assert [(e.generation, e.old, e.new) for e in watch.events] == [
        (2, "ready", "ready"),
        (1, "ready", "unloading"),
        (1, "unloading", None),
    ]


async def test_while_it_reloads_the_old_one_serves_and_says_so(
    loaded: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    reload = asyncio.create_task(loaded.reload_model(model_config()))
    await held.started()

    info = await loaded.get_model_info("a")
    assert (info.status, info.reloading, info.phase, info.generation) == (
        ModelStatus.READY,
        True,
        LoadPhase.READING,
        1,
    )
    assert await loaded.infer("a", 3) == 3
    held.release()
    await reload

    info = await loaded.get_model_info("a")
    assert (info.reloading, info.phase, info.generation) == (False, None, 2)


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), SystemExit(1)], ids=repr)
async def test_a_reload_that_fails_changes_nothing(
    loaded: AsyncModelManager,
    loader: FakeLoader,
    watch: Watch,
    model_config: Config,
    error: BaseException,
) -> None:
    old = await loaded.get_model("a")
    seen = len(watch.events)
    loader.prepare("a", error)

    with pytest.raises(ModelFailedError):
        await loaded.reload_model(model_config())

    assert await loaded.get_model("a") is old
    assert (await loaded.get_model_info("a")).error is None
    assert watch.events[seen:] == []
    assert loaded._table.successors == {}
    assert kept(loaded) == {"a": 60}
    assert await loaded.infer("a", 3) == 3
    assert await loaded.reload_model(model_config()) is True


async def test_a_reload_for_which_there_is_no_room_changes_nothing(
    loaded: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["a"] = MemoryEstimate(950, 900)

    with pytest.raises(InsufficientResourcesError, match="with the policy unload_first"):
        await loaded.reload_model(model_config())

    assert await loaded.infer("a", 3) == 3
    loader.estimates["b"] = MemoryEstimate(950, 900)
    with pytest.raises(InsufficientResourcesError) as refused:
        await loaded.load_model(model_config("b"))
    assert "unload_first" not in str(refused.value)


async def test_where_both_do_not_fit_the_old_one_can_go_first(
    loaded: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    loader.estimates["a"] = MemoryEstimate(950, 900)

    assert await loaded.reload_model(model_config(), "unload_first") is True

    assert [(e.generation, e.old, e.new) for e in watch.events] == [
        (1, "ready", "unloading"),
        (1, "unloading", None),
        (2, None, "loading"),
        (2, "loading", "ready"),
    ]


async def test_unload_first_waits_for_who_uses_the_old(
    loaded: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    async with loaded.use("a") as old:
        reload = asyncio.create_task(loaded.reload_model(model_config(), "unload_first"))
        await until(lambda: old.status is ModelStatus.UNLOADING)
        with pytest.raises(ModelUnloadingError):
            await loaded.infer("a", 1)
        with pytest.raises(ModelAlreadyLoadedError, match="there already, unloading"):
            await loaded.load_model(model_config())
        with pytest.raises(ModelUnloadingError):
            await loaded.reload_model(model_config())
        assert loader.loads == ["a"]

    assert await reload is True


async def test_unload_first_goes_on_when_nobody_waits_for_its_load(
    loaded: AsyncModelManager, model_config: Config
) -> None:
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    async with loaded.use("a") as old:
        begun = await loaded.start_reload(model_config(dtype="float16"), "unload_first")
        begun.cancel()
    await old.gone()

    assert await loaded.ensure_model(model_config(dtype="float16")) is True
    assert (await loaded.get_model_info("a")).generation == 2
    gc.collect()
    assert faults == []


async def test_unload_first_that_fails_leaves_the_reason(
    loaded: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.prepare("a", OSError("disk"))

    with pytest.raises(ModelFailedError, match="disk"):
        await loaded.reload_model(model_config(), "unload_first")

    assert (await loaded.get_model_info("a")).status is ModelStatus.FAILED


async def test_unload_first_whose_place_is_taken_meanwhile_is_told(
    make_manager: Make, model_config: Config
) -> None:
    manager = make_manager(max_models=1)
    await manager.load_model(model_config())
    managed = await manager.get_model("a")
    assert managed is not None
    hold = managed.hold(lambda _: None)
    reload = asyncio.create_task(manager.reload_model(model_config(), "unload_first"))
    await until(lambda: managed.drain is not None)
    async with manager.lock:
        taker = asyncio.create_task(manager.load_model(model_config("b")))
        await asyncio.sleep(0)  # it is next
        hold.release()
        await managed.gone()

    assert await taker is True
    with pytest.raises(InsufficientResourcesError, match="max_models is 1, and there are b"):
        await reload


async def test_a_caller_that_is_cancelled_goes_alone(
    loaded: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    held = loader.hold("a")
    caller = asyncio.create_task(loaded.reload_model(model_config()))
    await held.started()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller

    held.release()
    assert (await watch.until("a", "ready")).generation == 2


async def test_a_caller_that_is_cancelled_while_the_old_goes_first_goes_alone(
    loaded: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    async with loaded.use("a"):
        caller = asyncio.create_task(loaded.reload_model(model_config(), "unload_first"))
        await watch.until("a", "unloading")
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

    assert (await watch.until("a", "ready")).generation == 2


async def test_a_reload_can_be_cancelled_and_leaves_the_old(
    loaded: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    old = await loaded.get_model("a")
    held = loader.hold("a")
    reload = asyncio.create_task(loaded.reload_model(model_config()))
    await held.started()
    cancelling = asyncio.create_task(loaded.cancel_load("a"))
    with pytest.raises(LoadCancelledError):
        await reload
    assert kept(loaded) == {"a": 160}
    held.release()

    assert await cancelling is True
    assert await loaded.get_model("a") is old
    assert kept(loaded) == {"a": 60}


async def test_while_it_reloads_nothing_else_is_done_to_it(
    loaded: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    held = loader.hold("a")
    reload = asyncio.create_task(loaded.reload_model(model_config(dtype="float16")))
    await held.started()
    seen = len(watch.events)

    for policy in ("load_first", "unload_first"):
        with pytest.raises(ModelLoadingError, match="is being reloaded"):
            await loaded.reload_model(model_config(), policy)
    with pytest.raises(ModelLoadingError, match="is being reloaded"):
        await loaded.unload_model("a")
    with pytest.raises(ModelAlreadyLoadedError):
        await loaded.load_model(model_config())
    with pytest.raises(ModelAlreadyLoadedError):
        await loaded.ensure_model(model_config(dtype="bfloat16"))
    assert await loaded.ensure_model(model_config()) is True  # it is what is ready
    joins = asyncio.create_task(loaded.ensure_model(model_config(dtype="float16")))
    await asyncio.sleep(0)
    assert not joins.done()
    assert watch.events[seen:] == []
    held.release()

    assert await asyncio.gather(reload, joins) == [True, True]


async def test_what_is_not_there_can_not_be_reloaded(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    for policy in ("load_first", "unload_first"):
        with pytest.raises(ModelNotFoundError, match="no model 'a'"):
            await manager.reload_model(model_config(), policy)
    assert watch.events == []
    held = loader.hold("a")
    load = await manager.start_load(model_config())
    await held.started()
    with pytest.raises(ModelLoadingError, match="is being loaded"):
        await manager.reload_model(model_config())
    held.release()
    await load.outcome()


async def test_what_failed_is_loaded_again(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.prepare("a", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config())

    assert await manager.reload_model(model_config()) is True
    assert await manager.infer("a", 1) == 1


@pytest.mark.parametrize("policy", ["both", "", None, 3])
async def test_a_policy_has_a_name(
    loaded: AsyncModelManager, watch: Watch, model_config: Config, policy: str
) -> None:
    seen = len(watch.events)
    with pytest.raises(ValueError, match="one of load_first, unload_first, found"):
        await loaded.reload_model(model_config(), policy)
    with pytest.raises(ConfigError, match="needs split_points"):
        await loaded.reload_model(model_config(config={"component": "trunk"}))

    assert watch.events[seen:] == []


async def test_a_shutdown_during_a_reload_ends_both(
    loaded: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    reload = asyncio.create_task(loaded.reload_model(model_config()))
    await held.started()
    shutdown = asyncio.create_task(loaded.shutdown(drain_timeout=3600))
    await asyncio.sleep(0)
    held.release()

    with pytest.raises(ManagerClosedError):
        await reload
    await asyncio.wait_for(shutdown, PATIENCE)
    await until(lambda: kept(loaded) == {})  # its thread has the last word


async def test_a_shutdown_drains_what_was_replaced_as_well(
    loaded: AsyncModelManager, model_config: Config
) -> None:
    told = asyncio.Event()
    old = await loaded.get_model("a")
    assert old is not None
    hold = old.hold(lambda _: told.set())
    await loaded.reload_model(model_config())
    assert loaded._table.retiring == {old}

    shutdown = asyncio.create_task(loaded.shutdown(drain_timeout=0))
    await told.wait()
    hold.release()
    await shutdown

    assert loaded._table.retiring == set()


async def test_a_reloaded_model_can_be_reloaded_while_the_first_is_drained(
    loaded: AsyncModelManager, model_config: Config
) -> None:
    async with loaded.use("a") as first:
        for _ in range(3):
            await loaded.reload_model(model_config())
        await until(lambda: loaded._table.retiring == {first})
        assert kept(loaded) == {"a": 120}

        assert await loaded.unload_model("a") is True
        assert loaded.models == {}
        assert await first(5) == 5
        assert kept(loaded) == {"a": 60}
        await loaded.load_model(model_config())
    await first.gone()

    assert kept(loaded) == {"a": 60}
