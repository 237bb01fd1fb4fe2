"""What once went wrong, or could have, in the life of a model; each test is one such case."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import PATIENCE, FakeLoader, Watch, until

from splitlearn_core.machine import Memory
from splitlearn_manager.core import disposal
from splitlearn_manager.core.admission import Admission
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import (
    DrainTimeoutError,
    LoadCancelledError,
    ManagerClosedError,
    ModelFailedError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.progress import LoadProgress

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


class Tensor:
    """Something whose end can be seen."""


async def test_a_load_that_is_cancelled_before_its_first_step_settles(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    load = await manager.start_load(model_config())

    async with asyncio.timeout(PATIENCE):
        assert await manager.cancel_load("a") is True
        outcome = await load.outcome()

    assert isinstance(outcome.load_error(), LoadCancelledError)
    assert watch.moves("a") == [(None, "loading"), ("loading", "failed")]
    assert loader.loads == []


async def test_a_shutdown_right_after_a_load_has_begun_settles_it(
    manager: AsyncModelManager, model_config: Config
) -> None:
    load = await manager.start_load(model_config())

    await manager.shutdown()

    assert isinstance((await load.outcome()).load_error(), ManagerClosedError)


async def test_whoever_keeps_a_load_does_not_keep_its_model(
    manager: AsyncModelManager, model_config: Config
) -> None:
    load = await manager.start_load(model_config())
    await load.outcome()

    assert await manager.unload_model("a") is True


async def test_a_load_that_stops_when_told_to_leaves_no_tensor_behind(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    alive: list[weakref.ref[Tensor]] = []

    def load_from_config(_: ModelConfig, progress: LoadProgress) -> None:
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        begun.set()
        assert go_on.wait(PATIENCE)
        progress(1, 2)

    loader.load_from_config = load_from_config  # type: ignore[method-assign, assignment]
    load = await manager.start_load(model_config())
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    cancelling = asyncio.create_task(manager.cancel_load("a"))
    await load.outcome()
    gc.disable()
    try:
        go_on.set()
        assert await cancelling is True
        assert [reference() for reference in alive] == [None]
    finally:
        gc.enable()
    assert manager.models["a"].error() is not None


async def test_memory_of_a_late_model_is_released_after_the_model_is_gone(
    manager: AsyncModelManager,
    loader: FakeLoader,
    resources: ResourceManager,
    model_config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(*arguments: Any) -> Any:
        seen.append((threading.current_thread(), resources.get_current_usage().reserved_bytes))
        return see_it_gone(*arguments)

    seen: list[tuple[threading.Thread, int]] = []
    see_it_gone = disposal.see_it_gone
    monkeypatch.setattr("splitlearn_manager.core.loads.see_it_gone", look)
    late = loader.hold("a")
    late.listens = False
    load = await manager.start_load(model_config())
    await late.started()
    cancelling = asyncio.create_task(manager.cancel_load("a"))
    await load.outcome()
    late.release()

    assert await cancelling is True

    ((thread, reserved),) = seen
    assert thread is not threading.main_thread()
    assert reserved == 100
    assert resources.get_current_usage().reserved_bytes == 0
    assert late.closed is not None
    assert late.closed.is_set()


async def test_a_model_that_is_ready_too_late_is_not_closed_on_the_event_loop(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    closers: list[threading.Thread] = []

    class Closing:
        def close(self) -> None:
            closers.append(threading.current_thread())

    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def load_from_config(*_: object) -> Closing:
        begun.set()
        assert go_on.wait(PATIENCE)
        return Closing()

    loader.load_from_config = load_from_config  # type: ignore[method-assign, assignment]
    load = await manager.start_load(model_config())
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    async with manager.lock:  # so that it can't become ready
        load.work.add_done_callback(lambda _: done.set())
        go_on.set()
        assert done.wait(PATIENCE)
        load.owner.cancel()
    await load.outcome()
    await until(lambda: closers != [])

    assert closers[0] is not threading.main_thread()


async def test_an_error_that_can_not_be_shown_fails_the_load_all_the_same(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    class Unspeakable(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise ZeroDivisionError

    loader.prepare("a", Unspeakable())

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ModelFailedError, match=r"Unspeakable: \(it can't be shown\)"):
            await manager.load_model(model_config())


async def test_a_reload_that_waits_for_an_unload_is_told_of_a_shutdown(
    make_manager: Callable[..., AsyncModelManager], model_config: Config
) -> None:
    async def use() -> None:
        async with manager.use("a"):
            begun.set()
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

    manager = make_manager(unload_grace=3600)
    await manager.load_model(model_config())
    begun, let_go = asyncio.Event(), asyncio.Event()
    user = asyncio.create_task(use())
    await begun.wait()
    reload = asyncio.create_task(manager.reload_model(model_config(), "unload_first"))
    await until(lambda: manager.models["a"].status is ModelStatus.UNLOADING)

    await manager.shutdown(drain_timeout=0)

    with pytest.raises(ManagerClosedError, match="shut down"):
        await asyncio.wait_for(reload, PATIENCE)
    let_go.set()
    await user
    usage = manager.resource_manager.get_current_usage
    await until(lambda: usage().reserved_bytes == 0)


async def test_what_is_given_back_between_two_looks_is_no_reason_to_refuse() -> None:
    resources = ResourceManager(memory_limit=100)
    held = resources.reserve("old", 60)
    held.resize(60)

    class NoEvictor:
        def evict_for(self, *_: object) -> bool:
            return False

    is_changing = resources.is_changing

    def released_meanwhile(device: str) -> bool:
        held.release()  # by another thread, right after the refusal
        return is_changing(device)

    resources.is_changing = released_meanwhile  # type: ignore[method-assign]
    admission = Admission(resources, asyncio.Lock(), NoEvictor(), patience=PATIENCE)

    promise = await admission.reserve("new", 80, "cpu", Memory(100, 100))

    assert promise.nbytes == 80


def test_a_finalizer_may_release_while_the_ledger_is_open() -> None:
    resources = ResourceManager(memory_limit=100)
    lingering, other = resources.reserve("a", 30), resources.reserve("b", 30)

    def collected_just_then(device: str) -> int:
        lingering.release()  # as the garbage collector does, in whatever thread it runs
        return 100 if device else 0

    def ask() -> None:
        with resources._mutex:
            collected_just_then("cpu")
        answered.set()

    answered = threading.Event()
    threading.Thread(target=ask, daemon=True).start()

    assert answered.wait(PATIENCE)
    assert resources.get_current_usage().reservations == {"b": other.nbytes}


async def test_a_drain_that_is_over_lends_no_more(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config())
    managed = await manager.get_model("a")
    assert managed is not None

    unload = asyncio.create_task(manager.unload_model("a"))
    await until(lambda: managed.drain is not None)  # nobody has it, so that its drain is over

    with pytest.raises(ModelUnloadingError):
        async with managed.use():
            pass
    with pytest.raises(ModelUnloadingError):
        managed.hold(lambda _: None)
    assert await unload is True


async def test_what_could_not_be_measured_is_still_not_back_while_somebody_has_it(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config, watch: Watch
) -> None:
    loader.load_from_config = lambda *_: Tensor()  # type: ignore[method-assign]
    await manager.load_model(model_config())
    kept = manager.models["a"].model

    assert await manager.unload_model("a") is False

    assert watch.events[-1].unreturned_bytes == 60
    del kept


async def test_somebody_who_looks_at_a_model_while_it_goes_does_not_keep_it(
    manager: AsyncModelManager, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    await manager.load_model(model_config())
    glance = [manager.models["a"].model]
    monkeypatch.setattr(disposal.time, "sleep", lambda _: glance.clear())

    assert await manager.unload_model("a") is True


async def test_a_model_whose_close_exits_goes_all_the_same(
    manager: AsyncModelManager, model_config: Config
) -> None:
    def close() -> None:
        raise SystemExit(3)

    await manager.load_model(model_config())
    manager.models["a"].model.close = close

    assert await manager.unload_model("a") is True
    assert manager.models == {}


async def test_without_a_thread_to_spare_a_model_goes_all_the_same(
    manager: AsyncModelManager, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    await manager.load_model(model_config())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await manager.infer("a", 1)
        assert await manager.unload_model("a") is True

    assert manager.models == {}


def test_an_executor_without_a_thread_queues_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    executor = DaemonThreadPoolExecutor(2, "test")
    runs: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            executor.submit(runs.append, 1)
    executor.submit(runs.append, 2).result(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        executor.submit(runs.append, 3).result(PATIENCE)  # by the thread that there is
    executor.shutdown()

    assert runs == [2, 3]


@pytest.mark.parametrize("seconds", [10**400, 1e300, 3.3e9], ids=["int", "1e300", "century"])
async def test_absurdly_long_deadlines_are_for_ever(
    manager: AsyncModelManager, model_config: Config, seconds: float
) -> None:
    await manager.load_model(model_config())
    async with manager.use("a"):
        unload = asyncio.create_task(manager.unload_model("a", drain_timeout=seconds))
        await until(lambda: manager.models["a"].status is ModelStatus.UNLOADING)

    assert await unload is True


@pytest.mark.parametrize(
    "seconds", [-(10**400), -1e300, True, "1", b"1", [1], 1j], ids=lambda s: repr(s)[:8]
)
async def test_what_is_no_deadline_is_refused_and_changes_nothing(
    manager: AsyncModelManager, model_config: Config, watch: Watch, seconds: Any
) -> None:
    await manager.load_model(model_config())
    seen = len(watch.events)

    for ask in (
        manager.unload_model("a", drain_timeout=seconds),
        manager.cancel_load("a", grace=seconds),
        manager.shutdown(drain_timeout=seconds),
    ):
        with pytest.raises(ValueError, match="a timeout must be"):
            await ask

    assert watch.events[seen:] == []
    assert await manager.infer("a", 3) == 3


@pytest.mark.parametrize("model_id", ["", "..", "../a", "a/b", "a" * 500, "\0", "é", " "])
async def test_ids_that_nobody_has_are_not_found(manager: AsyncModelManager, model_id: str) -> None:
    for ask in (
        manager.get_model(model_id),
        manager.get_model_info(model_id),
        manager.infer(model_id, 1),
        manager.unload_model(model_id),
        manager.cancel_load(model_id),
    ):
        with pytest.raises(KeyError, match="there is no model"):
            await ask


async def test_whoever_keeps_the_error_of_an_ended_use_does_not_keep_the_model(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config())
    managed = await manager.get_model("a")
    assert managed is not None
    release, begun = threading.Event(), threading.Event()
    busy = asyncio.create_task(
        managed.run(lambda: (begun.set(), release.wait(PATIENCE)))  # no lease
    )
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    waiting = [asyncio.create_task(manager.infer("a", n)) for n in range(2)]
    await asyncio.sleep(0)
    unload = asyncio.create_task(manager.unload_model("a", drain_timeout=0))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    release.set()
    await busy

    gc.disable()
    try:
        assert await unload is True
    finally:
        gc.enable()
    assert [type(error) for error in errors] == [DrainTimeoutError] * 2
    assert errors[0] is not errors[1]


async def test_a_shutdown_waits_for_a_model_that_came_too_late_to_be_closed(
    manager: AsyncModelManager,
    loader: FakeLoader,
    resources: ResourceManager,
    model_config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("splitlearn_manager.core.loads._SEE_OFF", PATIENCE)
    begun, go_on, closing = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        def close(self) -> None:
            closing.set()
            assert go_on.wait(PATIENCE)

    loaded = loader.hold("a")
    loader.load_from_config = lambda *_: (  # type: ignore[method-assign]
        begun.set(),
        loaded.run(None),
        Slow(),
    )[-1]
    load = await manager.start_load(model_config())
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    shutdown = asyncio.create_task(manager.shutdown(drain_timeout=3600))
    await until(lambda: load.progress.stopped is not None)
    loaded.release()
    await load.outcome()
    assert await asyncio.to_thread(closing.wait, PATIENCE)
    await asyncio.sleep(0)
    assert not shutdown.done()
    go_on.set()
    await shutdown

    assert resources.get_current_usage().reserved_bytes == 0


@pytest.mark.parametrize("error", [StopIteration(3), StopAsyncIteration()], ids=repr)
async def test_a_loader_that_raises_what_a_future_does_not_take_fails(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config, error: Exception
) -> None:
    loader.prepare("a", error)

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ModelFailedError, match="Iteration"):
            await manager.load_model(model_config())
    loader.estimates["b"] = error
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ModelFailedError, match="Iteration"):
            await manager.load_model(model_config("b"))


@pytest.mark.parametrize(
    "error",
    [StopIteration(3), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()],
    ids=repr,
)
async def test_a_forward_that_raises_what_would_end_the_loop_only_fails(
    manager: AsyncModelManager, model_config: Config, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    await manager.load_model(model_config())
    async with asyncio.timeout(PATIENCE), manager.use("a") as managed:
        with pytest.raises(RuntimeError, match="a call in a worker thread ended with") as caught:
            await managed.run(fail)

    assert caught.value.__cause__ is error
    assert await manager.infer("a", 1) == 1
