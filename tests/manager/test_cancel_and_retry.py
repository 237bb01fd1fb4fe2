"""Loads that are cancelled at every step, given up when they hang, and tried again."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import PATIENCE, FakeLoader, Watch, until

from splitlearn_core.errors import QuantizationError, StepGraphError
from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.core import loads
from splitlearn_manager.core.deadlines import LoadDeadlines
from splitlearn_manager.core.entries import FailedEntry
from splitlearn_manager.core.loads import LoadPolicy
from splitlearn_manager.core.retry import RetryPolicy
from splitlearn_manager.core.states import LoadPhase, ModelStatus
from splitlearn_manager.errors import (
    InsufficientResourcesError,
    LoadCancelledError,
    LoadTimeoutError,
    ModelFailedError,
    ModelNotFoundError,
    ModelNotLoadingError,
)
from splitlearn_manager.server.model_state import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.resources import ResourceManager

    Config = Callable[..., ModelConfig]
    Make = Callable[..., AsyncModelManager]

pytestmark = pytest.mark.anyio


class Naps:
    """Waits between attempts that end when the test says so."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.go_on = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await self.go_on.wait()


class Clock:
    """What owners of loads take for the time: it stands still until a test lets it go on.

    Attributes:
        step: Seconds that pass with each look at it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step = 1000.0, 0.0
        monkeypatch.setattr(loads, "TICK", 0.001)
        monkeypatch.setattr(loads, "time", self)

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def time(self) -> float:
        return self.now


def phase(manager: AsyncModelManager, model_id: str = "a") -> LoadPhase | None:
    """Return what a load is at."""
    load = manager._table.load_under_way(model_id)
    return None if load is None else load.progress.phase


# --- Cancelling ----------------------------------------------------------------------------


async def test_a_load_that_reads_can_be_cancelled(
    manager: AsyncModelManager, loader: FakeLoader, resources: ResourceManager, model_config: Config
) -> None:
    held = loader.hold("a")
    caller = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    cancelling = asyncio.create_task(manager.cancel_load("a"))

    with pytest.raises(LoadCancelledError, match="the load of model 'a' was cancelled"):
        await caller
    assert not cancelling.done()  # its thread is still in it
    assert resources.get_current_usage().leaving_bytes == 100
    held.release()

    assert await cancelling is True
    assert resources.get_current_usage().reserved_bytes == 0
    info = await manager.get_model_info("a")
    assert (info.status, info.error, info.retry_at) == (
        ModelStatus.FAILED,
        "the load of model 'a' was cancelled",
        None,
    )
    assert manager.models["a"].code == "load_cancelled"


async def test_a_load_that_waits_for_a_worker_can_be_cancelled(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(max_workers=1)
    held = loader.hold("first")
    first = asyncio.create_task(manager.load_model(model_config("first")))
    await held.started()
    queued = await manager.start_load(model_config("a"))
    await until(lambda: queued.work is not None)
    assert phase(manager) is LoadPhase.QUEUED

    assert await manager.cancel_load("a") is True
    assert isinstance((await queued.outcome()).load_error(), LoadCancelledError)

    held.release()
    await first
    assert loader.loads == ["first"]


async def test_a_load_that_waits_for_memory_can_be_cancelled(
    manager: AsyncModelManager, loader: FakeLoader, resources: ResourceManager, model_config: Config
) -> None:
    loader.prepare("old", nbytes=900)
    await manager.load_model(model_config("old"))
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        loader.estimates["a"] = MemoryEstimate(500, 500)
        waiting = await manager.start_load(model_config("a"))
        await until(lambda: phase(manager) is LoadPhase.WAITING_FOR_MEMORY)

        assert await manager.cancel_load("a") is True
        assert isinstance((await waiting.outcome()).load_error(), LoadCancelledError)
        assert resources.get_current_usage().reservations == {"old": 900}

    assert await unload is True
    assert loader.loads == ["old"]


async def test_a_load_that_waits_for_its_next_attempt_can_be_cancelled(
    make_manager: Make, loader: FakeLoader, resources: ResourceManager, model_config: Config
) -> None:
    naps = Naps()
    manager = make_manager(load_policy=LoadPolicy(sleep=naps))
    loader.prepare("a", ConnectionResetError("gone"))
    load = await manager.start_load(model_config())
    await until(lambda: naps.seconds != [])
    assert phase(manager) is LoadPhase.QUEUED
    assert resources.get_current_usage().reserved_bytes == 0
    info = await manager.get_model_info("a")
    assert reason_of(info).endswith("; the last attempt failed: ConnectionResetError: gone")

    assert await manager.cancel_load("a") is True

    assert isinstance((await load.outcome()).load_error(), LoadCancelledError)
    assert loader.loads == ["a"]


async def test_a_second_cancel_finds_nothing(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    await manager.start_load(model_config())
    await held.started()
    assert await manager.cancel_load("a", grace=0) is False

    with pytest.raises(ModelNotLoadingError, match="no load of model 'a' is under way: it is fail"):
        await manager.cancel_load("a")
    held.release()
    await until(lambda: not manager._owners)


async def test_there_is_nothing_to_cancel_where_nothing_loads(
    manager: AsyncModelManager, model_config: Config
) -> None:
    with pytest.raises(ModelNotFoundError):
        await manager.cancel_load("a")
    await manager.load_model(model_config())
    with pytest.raises(ModelNotLoadingError, match="it is ready"):
        await manager.cancel_load("a")

    assert await manager.infer("a", 1) == 1


async def test_a_cancelled_canceller_goes_alone_and_the_load_ends(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    load = await manager.start_load(model_config())
    await held.started()
    cancelling = asyncio.create_task(manager.cancel_load("a"))
    await load.outcome()
    cancelling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelling
    remains = load.remains
    held.release()

    await asyncio.wrap_future(remains)


async def test_all_who_wait_for_a_load_are_told_of_its_cancellation(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    callers = [asyncio.create_task(manager.ensure_model(model_config())) for _ in range(5)]
    await held.started()
    assert await manager.cancel_load("a", grace=0) is False
    held.release()

    errors = await asyncio.gather(*callers, return_exceptions=True)

    assert all(isinstance(error, LoadCancelledError) for error in errors)
    assert len({id(error) for error in errors}) == 5


async def test_a_model_can_be_loaded_right_after_a_cancelled_load_whose_thread_hangs(
    manager: AsyncModelManager, loader: FakeLoader, resources: ResourceManager, model_config: Config
) -> None:
    held = loader.hold("a")
    await manager.start_load(model_config())
    await held.started()
    assert await manager.cancel_load("a", grace=0) is False

    await manager.load_model(model_config())

    assert resources.get_current_usage().reserved_bytes == 160
    held.release()
    await until(lambda: resources.get_current_usage().reserved_bytes == 60)
    assert await manager.infer("a", 1) == 1


# --- Deadlines -----------------------------------------------------------------------------


async def test_a_load_that_hangs_is_given_up_and_not_tried_again(
    make_manager: Make,
    loader: FakeLoader,
    resources: ResourceManager,
    model_config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    policy = LoadPolicy(deadlines=LoadDeadlines(stall=20))
    manager = make_manager(load_policy=policy)
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    clock.step = 1.0

    with pytest.raises(LoadTimeoutError, match=r"made no progress for 20 s \(reading, 0 of 60"):
        await load

    assert loader.loads == ["a"]
    assert (await manager.get_model_info("a")).retry_at is None
    assert manager.models["a"].code == "load_timeout"
    assert resources.get_current_usage().leaving_bytes == 100
    held.release()
    await until(lambda: resources.get_current_usage().reserved_bytes == 0)


async def test_a_load_that_creeps_is_given_up_by_its_size(
    make_manager: Make, loader: FakeLoader, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def creep(_: ModelConfig, progress: Any) -> None:
        while True:
            done = progress.bytes_done + 1
            time.sleep(0.001)
            progress(done, 10**9)

    monkeypatch.setattr(loads, "TICK", 0.005)
    policy = LoadPolicy(deadlines=LoadDeadlines(stall=PATIENCE, base=0.05, per_gib=0))
    manager = make_manager(load_policy=policy)
    loader.load_from_config = creep  # type: ignore[method-assign, assignment]

    with pytest.raises(LoadTimeoutError, match=r"was not done after 0.05 s, which is the limit"):
        await manager.load_model(model_config())


async def test_a_queue_is_no_reason_to_give_up(
    make_manager: Make, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looked = Clock(monkeypatch), asyncio.Event()
    deadlines = LoadDeadlines(stall=10, base=10)
    manager = make_manager(max_workers=1, load_policy=LoadPolicy(deadlines=deadlines))
    go_on = threading.Event()
    manager.executor.submit(go_on.wait, PATIENCE)
    watch = manager._loads._watch

    def look(*args: Any, **kwargs: Any) -> None:
        clock.now += 100
        watch(*args, **kwargs)
        looked.set()

    with monkeypatch.context() as patch:
        patch.setattr(manager._loads, "_watch", look)
        load = asyncio.create_task(manager.load_model(model_config()))
        await looked.wait()
    go_on.set()

    assert await load


async def test_an_estimate_that_hangs_is_given_up_too(
    make_manager: Make, loader: FakeLoader, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    held = loader.hold("a", error=OSError("late"))
    monkeypatch.setattr(loader, "estimate", lambda _: held.run(None))
    manager = make_manager(load_policy=LoadPolicy(deadlines=LoadDeadlines(stall=20)))
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    clock.step = 1.0

    with pytest.raises(LoadTimeoutError, match="made no progress"):
        await load
    held.release()


# --- Retries -------------------------------------------------------------------------------


async def test_what_heals_is_tried_again_with_growing_waits(
    make_manager: Make, loader: FakeLoader, resources: ResourceManager, model_config: Config
) -> None:
    naps = Naps()
    naps.go_on.set()
    policy = LoadPolicy(retry=RetryPolicy(attempts=3, first=4), sleep=naps)
    manager = make_manager(load_policy=policy)
    loader.prepare("a", ConnectionResetError("gone"))
    loader.prepare("a", ConnectionRefusedError("not there"))

    assert await manager.load_model(model_config()) is True

    assert loader.loads == ["a"] * 3
    assert 3 <= naps.seconds[0] <= 4
    assert 12 <= naps.seconds[1] <= 16
    assert resources.get_current_usage().reservations == {"a": 60}


async def test_what_does_not_heal_in_time_keeps_when_it_may_be_tried_again(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    naps = Naps()
    naps.go_on.set()
    policy = LoadPolicy(retry=RetryPolicy(attempts=2, first=4), sleep=naps)
    manager = make_manager(load_policy=policy)
    loader.estimates["a"] = ConnectionError("no route")
    before = time.time()

    with pytest.raises(ModelFailedError, match="ConnectionError: no route"):
        await manager.load_model(model_config())

    info = await manager.get_model_info("a")
    assert info.failed_at is not None
    assert info.retry_at == info.failed_at + 16
    assert info.failed_at >= before
    assert len(naps.seconds) == 1
    assert manager.models["a"].code == "fetch_failed"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError("no"), "out_of_memory"),
        (FileNotFoundError("no"), "not_found"),
        (OSError(28, "no space left"), "storage"),
        (ValueError("no"), "bad_checkpoint"),
        (QuantizationError("no"), "unsupported_quantization"),
        (StepGraphError("no"), "unsupported_cuda_graphs"),
        (KeyError("no"), "unsupported_model"),
        (ZeroDivisionError(), "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_what_does_not_heal_is_tried_once(
    make_manager: Make,
    loader: FakeLoader,
    resources: ResourceManager,
    model_config: Config,
    error: Exception,
    code: str,
) -> None:
    manager = make_manager(load_policy=LoadPolicy(sleep=Naps()))
    loader.prepare("a", error)

    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config())

    failed = manager.models["a"]
    assert isinstance(failed, FailedEntry)
    assert (failed.code, failed.retry_at) == (code, None)
    assert resources.get_current_usage().reserved_bytes == 0
    assert loader.loads == ["a"]


async def test_what_does_not_fit_is_not_tried_again(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(load_policy=LoadPolicy(sleep=Naps()))
    loader.estimates["a"] = MemoryEstimate(5000, 5000)

    with pytest.raises(InsufficientResourcesError):
        await manager.load_model(model_config())

    assert manager.models["a"].retry_at is None


async def test_a_shutdown_ends_the_wait_for_another_attempt(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    naps = Naps()
    manager = make_manager(load_policy=LoadPolicy(sleep=naps))
    watch = Watch()
    manager.on_transition.append(watch)
    loader.prepare("a", ConnectionError("gone"))
    load = asyncio.create_task(manager.load_model(model_config()))
    await until(lambda: naps.seconds != [])

    await asyncio.wait_for(manager.shutdown(drain_timeout=3600), PATIENCE)

    with pytest.raises(RuntimeError, match="the manager shut down during the load"):
        await load
    assert watch.moves("a") == [(None, "loading"), ("loading", "failed"), ("failed", None)]


async def test_progress_shows_bytes_rate_and_time_left(
    manager: AsyncModelManager,
    loader: FakeLoader,
    model_config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step_by_step(_: ModelConfig, progress: Any) -> Any:
        done = 0
        while done < 10**9 and not go_on.is_set():
            done += 1000
            time.sleep(0.0005)
            progress(done, 10**9)
        return held.run(None)

    monkeypatch.setattr(loads, "TICK", 0.005)
    go_on, held = asyncio.Event(), loader.hold("a")
    held.release()
    loader.load_from_config = step_by_step  # type: ignore[method-assign]
    load = await manager.start_load(model_config())
    await until(lambda: load.info().bytes_per_second is not None)

    info = await manager.get_model_info("a")
    assert info.phase is LoadPhase.READING
    assert 0 < info.bytes_done < info.bytes_total == 10**9
    assert info.bytes_per_second is not None
    assert info.bytes_per_second > 0
    assert info.seconds_left is not None
    assert info.elapsed_s is not None
    assert info.elapsed_s > 0
    go_on.set()
    await load.outcome()
    after = await manager.get_model_info("a")
    assert (after.phase, after.elapsed_s, after.seconds_left) == (None, None, None)
