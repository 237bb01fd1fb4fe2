from __future__ import annotations

import asyncio
import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import FakeLoader, Watch, until

from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import (
    DrainTimeoutError,
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
    from splitlearn_manager.core.resources import ResourceManager

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


@pytest.fixture
async def loaded(manager: AsyncModelManager, model_config: Config) -> AsyncModelManager:
    """Return a manager with the model `a`."""
    await manager.load_model(model_config())
    return manager


class Gate:
    """A function that waits in a model's thread until the test says so."""

    def __init__(self) -> None:
        self.runs = 0
        self._entered = threading.Event()
        self._released = threading.Event()

    def __call__(self) -> str:
        self.runs += 1
        self._entered.set()
        assert self._released.wait(30)
        return threading.current_thread().name

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 30)

    def release(self) -> None:
        self._released.set()


async def test_uses_are_counted(loaded: AsyncModelManager) -> None:
    async with loaded.use("a") as first, loaded.use("a") as second:
        assert first is second
        info = await loaded.get_model_info("a")
        assert (info.in_flight, info.request_count) == (2, 2)
        assert info.last_used is not None

    info = await loaded.get_model_info("a")
    assert (info.in_flight, info.request_count) == (0, 2)


async def test_a_use_that_fails_is_counted_out(loaded: AsyncModelManager) -> None:
    with pytest.raises(ZeroDivisionError):
        async with loaded.use("a"):
            raise ZeroDivisionError

    assert (await loaded.get_model_info("a")).in_flight == 0


async def test_forwards_run_in_the_models_own_thread_one_by_one(
    loaded: AsyncModelManager,
) -> None:
    async with loaded.use("a") as managed:
        answers = await asyncio.gather(*(managed(n) for n in range(5)))
        threads = managed.model.threads

    assert answers == [0, 1, 2, 3, 4]
    assert threads == ["splitlearn-model-a-0"] * 5


async def test_run_takes_any_function_and_passes_its_error_on(loaded: AsyncModelManager) -> None:
    async with loaded.use("a") as managed:
        assert await managed.run(pow, 2, exp=5) == 32
        with pytest.raises(ZeroDivisionError):
            await managed.run(divmod, 1, 0)


async def test_a_cancelled_run_leaves_at_once_and_what_waits_is_not_run(
    loaded: AsyncModelManager,
) -> None:
    running, waiting = Gate(), Gate()
    async with loaded.use("a") as managed:
        first = asyncio.create_task(managed.run(running))
        await running.entered()
        second = asyncio.create_task(managed.run(waiting))
        await asyncio.sleep(0)  # the second is queued behind the first
        for task in (second, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        running.release()
        assert await managed.run(int) == 0

    assert (running.runs, waiting.runs) == (1, 0)


async def test_what_is_not_there_can_not_be_used(manager: AsyncModelManager) -> None:
    for ask in (manager.get_model("a"), manager.infer("a", 1), manager.unload_model("a")):
        with pytest.raises(ModelNotFoundError, match="there is no model 'a'; there are: none"):
            await ask


async def test_an_unload_waits_for_uses_and_refuses_new_ones(
    loaded: AsyncModelManager, watch: Watch
) -> None:
    async with loaded.use("a") as managed:
        unload = asyncio.create_task(loaded.unload_model("a"))
        await watch.until("a", "unloading")
        assert (await loaded.get_model_info("a")).status is ModelStatus.UNLOADING
        for ask in (loaded.get_model("a"), loaded.infer("a", 1)):
            with pytest.raises(ModelUnloadingError, match="model 'a' is being unloaded"):
                await ask
        assert await managed(5) == 5  # whoever has it may finish
        assert not unload.done()

    assert await unload is True
    assert await loaded.list_models() == []
    assert watch.moves("a") == [("ready", "unloading"), ("unloading", None)]


async def test_a_model_can_be_loaded_again_once_it_is_gone(
    loaded: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    async with loaded.use("a"):
        unload = asyncio.create_task(loaded.unload_model("a"))
        await watch.until("a", "unloading")
        with pytest.raises(ModelAlreadyLoadedError, match="there already, unloading"):
            await loaded.load_model(model_config())
    await unload

    assert await loaded.load_model(model_config()) is True


async def test_at_the_deadline_what_is_in_flight_is_ended_and_told_why(
    loaded: AsyncModelManager, watch: Watch
) -> None:
    async def use() -> None:
        async with loaded.use("a"):
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    user = asyncio.create_task(use())
    await begun.wait()

    assert await loaded.unload_model("a", drain_timeout=0) is True

    with pytest.raises(DrainTimeoutError, match="being unloaded, and this use of it had not ended"):
        await user
    assert user.cancelling() == 0
    assert loaded.models == {}
    assert watch.moves("a") == [("ready", "unloading"), ("unloading", None)]


async def test_a_use_that_is_cancelled_by_its_own_side_is_just_that(
    loaded: AsyncModelManager,
) -> None:
    async def use() -> None:
        async with loaded.use("a"):
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    user = asyncio.create_task(use())
    await begun.wait()
    user.cancel()
    unload = asyncio.create_task(loaded.unload_model("a", drain_timeout=0))

    with pytest.raises(asyncio.CancelledError):
        await user
    assert await unload is True


async def test_a_use_that_does_not_heed_is_left_behind(
    make_manager: Callable[..., AsyncModelManager], model_config: Config
) -> None:
    async def use() -> None:
        async with manager.use("a"):
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await let_go.wait()

    manager = make_manager(unload_grace=0)
    await manager.load_model(model_config())
    begun, let_go = asyncio.Event(), asyncio.Event()
    user = asyncio.create_task(use())
    await begun.wait()

    await manager.unload_model("a", drain_timeout=0)
    assert manager.models == {}

    let_go.set()
    await user


async def test_a_second_unload_can_bring_the_deadline_nearer(
    loaded: AsyncModelManager, watch: Watch
) -> None:
    async def use() -> None:
        async with loaded.use("a"):
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    user = asyncio.create_task(use())
    await begun.wait()
    patient = asyncio.create_task(loaded.unload_model("a", drain_timeout=math.inf))
    await watch.until("a", "unloading")

    assert await loaded.unload_model("a", drain_timeout=0) is True
    assert await patient is True
    with pytest.raises(DrainTimeoutError):
        await user


async def test_an_unload_without_a_deadline_waits(loaded: AsyncModelManager, watch: Watch) -> None:
    async with loaded.use("a"):
        unload = asyncio.create_task(loaded.unload_model("a", drain_timeout=math.inf))
        await watch.until("a", "unloading")

    assert await unload


@pytest.mark.parametrize("seconds", [-1, -0.001, math.nan])
async def test_a_deadline_must_be_one(loaded: AsyncModelManager, seconds: float) -> None:
    with pytest.raises(ValueError, match="a timeout must be 0 seconds or more, found"):
        await loaded.unload_model("a", drain_timeout=seconds)

    assert loaded.models["a"].status is ModelStatus.READY


async def test_a_cancelled_unload_goes_on_and_a_second_one_joins(
    loaded: AsyncModelManager, watch: Watch
) -> None:
    async with loaded.use("a"):
        first = asyncio.create_task(loaded.unload_model("a"))
        await watch.until("a", "unloading")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(loaded.unload_model("a"))

    assert await second is True
    assert watch.moves("a") == [("ready", "unloading"), ("unloading", None)]


async def test_what_is_loading_can_not_be_unloaded(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()

    with pytest.raises(ModelLoadingError):
        await manager.unload_model("a")

    held.release()
    assert await load


async def test_what_failed_is_removed_at_once(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    loader.prepare("a", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config())

    assert await manager.unload_model("a") is True

    assert watch.moves("a")[-1] == ("failed", None)


async def test_an_unload_says_what_is_not_back_while_a_forward_hangs(
    make_manager: Callable[..., AsyncModelManager], resources: ResourceManager, model_config: Config
) -> None:
    manager = make_manager(unload_grace=0)
    await manager.load_model(model_config())
    gate = Gate()

    async def forward() -> Any:
        async with manager.use("a") as managed:
            return await managed.run(gate)

    caller = asyncio.create_task(forward())
    await gate.entered()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    events = manager.events()
    moves = [asyncio.ensure_future(anext(events))]
    await asyncio.sleep(0)  # it listens from now on

    assert await manager.unload_model("a", drain_timeout=0) is False

    await moves[0]
    gone = await anext(events)
    assert (gone.new, gone.unreturned_bytes) == (None, 60)
    assert gone.reason == "unloaded, but 60 bytes are not back"
    assert resources.get_current_usage().reserved_bytes == 60
    gate.release()
    await until(lambda: resources.get_current_usage().reserved_bytes == 0)
    await events.aclose()


async def test_an_unloaded_model_is_freed(loaded: AsyncModelManager) -> None:
    managed = loaded.models["a"]
    freed = weakref.ref(managed.model)

    await loaded.unload_model("a")

    assert freed() is None
    for use in (managed(1), managed.run(int)):
        with pytest.raises(ModelUnloadingError, match="model 'a' was unloaded"):
            await use


async def test_an_unloaded_model_is_closed_first(
    loaded: AsyncModelManager, caplog: pytest.LogCaptureFixture
) -> None:
    def close() -> None:
        closed.append(threading.current_thread().name)
        raise ConnectionError

    closed: list[str] = []
    loaded.models["a"].model.close = close

    await loaded.unload_model("a")

    assert closed == ["splitlearn-model-a-0"]
    assert any(message.startswith("closing a FakeModel failed\n") for message in caplog.messages)


async def test_a_model_in_a_cycle_is_freed_too(loaded: AsyncModelManager) -> None:
    model = loaded.models["a"].model
    model.itself = model
    freed = weakref.ref(model)
    del model

    await loaded.unload_model("a")

    assert freed() is None


async def test_a_model_that_somebody_keeps_is_told_of_and_stays_reserved(
    loaded: AsyncModelManager, resources: ResourceManager, caplog: pytest.LogCaptureFixture
) -> None:
    kept = loaded.models["a"].model

    assert await loaded.unload_model("a") is False

    assert kept is not None
    assert "something else still refers to the model" in caplog.text
    usage = resources.get_current_usage()
    assert (usage.reserved_bytes, usage.leaving_bytes) == (60, 60)
    del kept
    assert resources.get_current_usage().reserved_bytes == 0
