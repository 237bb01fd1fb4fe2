from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from manager_fakes import PATIENCE, FakeLoader, Watch, until

from splitlearn_core.errors import CheckpointError
from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.entries import AsyncManagedModel, FailedEntry
from splitlearn_manager.core.model_info import ModelInfo
from splitlearn_manager.core.states import LoadPhase, ModelStatus
from splitlearn_manager.errors import (
    ConfigError,
    InsufficientResourcesError,
    LoadCancelledError,
    ModelAlreadyLoadedError,
    ModelFailedError,
    ModelLoadingError,
    ModelNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.events import TransitionEvent
    from splitlearn_manager.core.resources import ResourceManager

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


async def test_a_model_is_ready_when_load_model_returns(
    manager: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    before = time.time()

    assert await manager.load_model(model_config()) is True

    model = await manager.get_model("a")
    assert isinstance(model, AsyncManagedModel)
    assert watch.moves("a") == [(None, "loading"), ("loading", "ready")]
    info = await manager.get_model_info("a")
    assert info.loaded_at is not None
    assert before <= info.loaded_at <= time.time()
    assert info == ModelInfo(
        model_id="a",
        status=ModelStatus.READY,
        component="trunk",
        start_layer=2,
        end_layer=6,
        device="cpu",
        dtype="float32",
        loaded_at=info.loaded_at,
        bytes_total=60,
        bytes_done=60,
        reserved_bytes=60,
        resident_bytes=60,
    )


async def test_while_loading_the_place_is_held_and_nothing_is_lent(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()

    assert await manager.get_model("a") is None
    with pytest.raises(ModelLoadingError, match="model 'a' is being loaded"):
        async with manager.use("a"):
            pass
    assert await manager.get_model_info("a") == ModelInfo(
        model_id="a",
        status=ModelStatus.LOADING,
        component="trunk",
        bytes_total=60,
        reserved_bytes=100,
        phase=LoadPhase.READING,
    )

    held.release()
    assert await load


async def test_a_second_load_is_refused_while_loading_and_when_ready(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()

    with pytest.raises(ModelLoadingError):
        await manager.load_model(model_config())
    held.release()
    await load
    with pytest.raises(ModelAlreadyLoadedError, match="model 'a' is there already, ready"):
        await manager.load_model(model_config())

    assert loader.loads == ["a"]


async def test_loads_that_start_at_once_have_one_winner(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    results = await asyncio.gather(
        *(manager.load_model(model_config()) for _ in range(8)), return_exceptions=True
    )

    assert results.count(True) == 1
    assert sum(isinstance(result, ModelLoadingError) for result in results) == 7
    assert loader.loads == ["a"]


async def test_a_cancelled_caller_goes_alone(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    held = loader.hold("a")
    caller = asyncio.create_task(manager.load_model(model_config()))
    await held.started()

    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await manager.get_model("a") is None

    held.release()
    await watch.until("a", "ready")
    assert await manager.infer("a", 7) == 7


async def test_a_caller_that_times_out_goes_alone(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    held = loader.hold("a")

    async def impatient() -> None:
        async with asyncio.timeout(None) as limit:
            load = asyncio.ensure_future(manager.load_model(model_config()))
            await held.started()
            limit.reschedule(asyncio.get_running_loop().time())
            await load

    with pytest.raises(TimeoutError):
        await impatient()
    held.release()
    await watch.until("a", "ready")


async def test_a_failed_load_keeps_its_reason_and_gives_its_memory_back(
    manager: AsyncModelManager,
    loader: FakeLoader,
    resources: ResourceManager,
    watch: Watch,
    model_config: Config,
) -> None:
    loader.prepare("a", CheckpointError("model.safetensors lacks h.3.weight"))

    with pytest.raises(ModelFailedError) as caught:
        await manager.load_model(model_config())

    reason = "CheckpointError: model.safetensors lacks h.3.weight"
    assert str(caught.value) == f"model 'a' failed to load: {reason}"
    assert isinstance(caught.value.__cause__, CheckpointError)
    assert watch.events[-1].reason == reason
    assert resources.get_current_usage().reserved_bytes == 0
    assert await manager.get_model_info("a") == ModelInfo(
        model_id="a", status=ModelStatus.FAILED, component="trunk", error=reason
    )
    for ask in (manager.get_model("a"), manager.infer("a", 1)):
        with pytest.raises(ModelFailedError, match=r"lacks h\.3\.weight"):
            await ask


async def test_loading_again_replaces_a_failed_entry(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    loader.prepare("a", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config())

    await manager.load_model(model_config())

    assert watch.moves("a")[2:] == [("failed", "loading"), ("loading", "ready")]
    assert [event.generation for event in watch.events] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr
)
async def test_a_loader_that_wants_to_end_the_program_only_fails(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config, error: BaseException
) -> None:
    loader.prepare("a", error)

    with pytest.raises(ModelFailedError) as caught:
        await manager.load_model(model_config())

    assert f"the loader ended with {error!r}" in str(caught.value)
    assert caught.value.__cause__ is error


async def test_an_estimate_that_wants_to_end_the_program_only_fails(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["a"] = SystemExit(3)

    with pytest.raises(ModelFailedError, match=r"the loader ended with SystemExit\(3\)"):
        await manager.load_model(model_config())


async def test_an_estimate_that_fails_fails_the_load(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["a"] = FileNotFoundError("no folder 'nowhere'")

    with pytest.raises(ModelFailedError, match="FileNotFoundError: no folder 'nowhere'"):
        await manager.load_model(model_config())

    assert loader.loads == []


async def test_each_waiter_gets_an_error_of_its_own(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a", OSError("disk"))
    first = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    second = asyncio.create_task(manager.ensure_model(model_config()))
    held.release()

    errors = await asyncio.gather(first, second, return_exceptions=True)

    assert [str(error) for error in errors] == ["model 'a' failed to load: OSError: disk"] * 2
    assert errors[0] is not errors[1]


async def test_a_failed_load_keeps_nothing_alive(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    class Tensor:
        pass

    alive: list[weakref.ref[Tensor]] = []

    def load_from_config(*_: object) -> None:
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        try:
            {}["inner"]
        except KeyError as error:
            raise CheckpointError("outer") from error

    loader.load_from_config = load_from_config  # type: ignore[method-assign]
    gc.disable()
    try:
        with pytest.raises(ModelFailedError) as caught:
            await manager.load_model(model_config())
    finally:
        gc.enable()

    assert [reference() for reference in alive] == [None]
    assert str(caught.value.__cause__) == "outer"
    assert isinstance(manager.models["a"], FailedEntry)


async def test_the_frames_of_an_unexpected_error_are_logged(
    manager: AsyncModelManager,
    loader: FakeLoader,
    model_config: Config,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader.prepare("a", ZeroDivisionError("oh"))

    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config())

    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "Traceback" in record.getMessage()
    assert "raise self.error" in record.getMessage()
    assert record.exc_info is None


async def test_what_does_not_fit_is_refused_with_every_figure(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await manager.load_model(model_config("small"))
    loader.estimates["big"] = MemoryEstimate(950, 900)

    with pytest.raises(InsufficientResourcesError) as caught:
        await manager.load_model(model_config("big"))

    assert str(caught.value).startswith(
        "model 'big' needs 950 bytes on cpu, where models may have 1000 bytes: 60 bytes is"
        " reserved (small 60 bytes), and "
    )
    assert (await manager.get_model_info("big")).error == str(caught.value)
    assert loader.loads == ["small"]


async def test_two_loads_that_fit_one_by_one_do_not_both_pass(
    manager: AsyncModelManager,
    loader: FakeLoader,
    resources: ResourceManager,
    model_config: Config,
) -> None:
    loader.estimates = {"a": MemoryEstimate(600, 400), "b": MemoryEstimate(600, 400)}
    held = loader.hold("a", nbytes=400)
    first = asyncio.create_task(manager.load_model(model_config("a")))
    await held.started()

    second = asyncio.create_task(manager.load_model(model_config("b")))
    await until(lambda: _phase(manager, "b") is LoadPhase.WAITING_FOR_MEMORY)
    assert resources.get_current_usage().reservations == {"a": 600}

    held.release()
    await first
    await second  # the first one takes less, now that it is there
    assert resources.get_current_usage().reservations == {"a": 400, "b": 60}


async def test_what_was_measured_replaces_what_was_estimated(
    manager: AsyncModelManager,
    loader: FakeLoader,
    model_config: Config,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for model_id, nbytes in (("less", 10), ("more", 300), ("too-much", 950)):
        loader.prepare(model_id, nbytes=nbytes)
        await manager.load_model(model_config(model_id))

    infos = {info.model_id: info for info in await manager.list_models()}
    assert [infos[name].reserved_bytes for name in infos] == [10, 300, 690]
    assert infos["too-much"].resident_bytes == 950
    assert (
        "model too-much takes 950 bytes, which is 260 more than could be reserved for it"
        in caplog.messages
    )


async def test_a_model_that_can_not_be_measured_has_what_was_estimated(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.load_from_config = lambda *_: object()  # type: ignore[method-assign]

    await manager.load_model(model_config())

    info = await manager.get_model_info("a")
    assert (info.reserved_bytes, info.resident_bytes, info.component) == (60, 0, "trunk")


async def test_max_models_counts_all_but_failed_ones(
    make_manager: Callable[..., AsyncModelManager], loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(max_models=2)
    loader.prepare("failed", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config("failed"))
    held = loader.hold("loading")
    load = asyncio.create_task(manager.load_model(model_config("loading")))
    await held.started()
    await manager.load_model(model_config("ready"))

    with pytest.raises(InsufficientResourcesError, match=r"max_models is 2.* loading, ready"):
        await manager.load_model(model_config("more"))

    with pytest.raises(ModelNotFoundError, match="no model 'more'; there are: failed, loading,"):
        await manager.get_model_info("more")
    held.release()
    await load


async def test_loads_beyond_max_workers_wait_their_turn(
    make_manager: Callable[..., AsyncModelManager], loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(max_workers=1)
    first, second = loader.hold("a"), loader.hold("b")
    loads = [asyncio.create_task(manager.load_model(model_config("a")))]
    await first.started()
    loads.append(asyncio.create_task(manager.load_model(model_config("b"))))
    await asyncio.sleep(0)  # the second caller takes its place in the table

    phases = {name: entry.progress.phase for name, entry in manager.models.items()}
    assert phases == {"a": LoadPhase.READING, "b": LoadPhase.QUEUED}

    first.release()
    second.release()
    assert await asyncio.gather(*loads) == [True, True]
    assert loader.loads == ["a", "b"]


async def test_reading_headers_is_no_waiting(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    headers = loader.hold("a", error=OSError("no header"))
    loader.estimate = lambda _: headers.run(None)  # type: ignore[method-assign, assignment, return-value]
    load = await manager.start_load(model_config())
    await headers.started()
    waited = load.progress.waited_s

    assert load.progress.phase is LoadPhase.READING
    assert load.progress.waited_s == waited  # it grows no more
    headers.release()
    await load.outcome()


async def test_with_memory_but_without_a_worker_a_load_is_queued(
    make_manager: Callable[..., AsyncModelManager], loader: FakeLoader, model_config: Config
) -> None:
    def estimate(_: ModelConfig) -> MemoryEstimate:
        manager.executor.submit(go_on.wait, PATIENCE)  # takes the one worker after this
        return MemoryEstimate(100, 60)

    manager, go_on = make_manager(max_workers=1), threading.Event()
    loader.estimate = estimate  # type: ignore[method-assign]
    load = await manager.start_load(model_config())
    await until(lambda: load.reservation is not None)

    assert load.progress.phase is LoadPhase.QUEUED
    go_on.set()
    assert (await load.outcome()).status is ModelStatus.READY


async def test_ensure_model_joins_a_load_of_the_same_configuration(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    held = loader.hold("a")
    first = asyncio.create_task(manager.ensure_model(model_config()))
    await held.started()
    second = asyncio.create_task(manager.ensure_model(model_config()))
    with pytest.raises(ModelLoadingError):
        await manager.ensure_model(model_config(dtype="float16"))
    held.release()

    assert await asyncio.gather(first, second) == [True, True]
    assert await manager.ensure_model(model_config()) is True
    assert loader.loads == ["a"]


async def test_ensure_model_does_not_take_another_configuration_for_the_same(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.ensure_model(model_config())

    with pytest.raises(ModelAlreadyLoadedError):
        await manager.ensure_model(model_config(dtype="float16"))


async def test_ensure_model_loads_again_what_failed(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.prepare("a", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.ensure_model(model_config())

    assert await manager.ensure_model(model_config()) is True


async def test_a_wrong_configuration_changes_nothing(
    manager: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    wrong = model_config(config={"component": "trunk"})

    for load in (manager.load_model, manager.ensure_model):
        with pytest.raises(ConfigError, match=r"config\.component: needs split_points"):
            await load(wrong)

    assert watch.events == []


async def test_a_thread_that_comes_late_does_not_overwrite_a_newer_model(
    manager: AsyncModelManager,
    loader: FakeLoader,
    resources: ResourceManager,
    watch: Watch,
    model_config: Config,
) -> None:
    late = loader.hold("a", nbytes=11)
    caller = asyncio.create_task(manager.load_model(model_config()))
    await late.started()
    work = manager.models["a"].work
    (owner,) = manager._owners
    owner.cancel()

    with pytest.raises(LoadCancelledError, match="the load was cancelled"):
        await caller
    assert (await manager.get_model_info("a")).error == "the load was cancelled"
    assert (await manager.get_model_info("a")).reserved_bytes == 100  # the thread still has it

    await manager.load_model(model_config())
    assert resources.get_current_usage().reserved_bytes == 160
    ended = threading.Event()
    work.add_done_callback(lambda _: ended.set())  # after the manager's own
    late.release()
    assert await asyncio.to_thread(ended.wait, 30)

    assert resources.get_current_usage().reservations == {"a": 60}
    await manager.unload_model("a")
    assert [(e.generation, e.new) for e in watch.events if e.model_id == "a"] == [
        (1, "loading"),
        (1, "failed"),
        (2, "loading"),
        (2, "ready"),
        (2, "unloading"),
        (2, None),
    ]


async def test_a_load_that_was_given_up_ends_in_nothing(
    manager: AsyncModelManager,
    loader: FakeLoader,
    resources: ResourceManager,
    model_config: Config,
) -> None:
    late = loader.hold("a")
    caller = asyncio.create_task(manager.load_model(model_config()))
    await late.started()
    late.listens = False
    assert await manager.cancel_load("a", grace=0) is False
    with pytest.raises(LoadCancelledError, match="the load of model 'a' was cancelled"):
        await caller
    await manager.load_model(model_config())
    newer = manager.models["a"]

    late.release()
    await until(lambda: resources.get_current_usage().reserved_bytes == 60)

    assert manager.models["a"] is newer
    assert late.closed is not None
    assert late.closed.is_set()


async def test_a_thread_whose_load_was_given_up_is_asked_to_stop(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    late = loader.hold("a")
    caller = asyncio.create_task(manager.load_model(model_config()))
    await late.started()
    work = manager.models["a"].work
    assert await manager.cancel_load("a", grace=0) is False
    with pytest.raises(LoadCancelledError):
        await caller

    late.release()
    with pytest.raises(LoadCancelledError, match="the load of model 'a' was cancelled"):
        await asyncio.wrap_future(work)

    assert late.closed is None


async def test_a_queued_load_that_is_cancelled_gives_its_turn_up(
    make_manager: Callable[..., AsyncModelManager], loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(max_workers=1)
    held = loader.hold("a")
    first = asyncio.create_task(manager.load_model(model_config("a")))
    await held.started()
    second = asyncio.create_task(manager.load_model(model_config("b")))
    await asyncio.sleep(0)  # the second caller takes its place in the table
    (owner,) = [task for task in manager._owners if "model b" in task.get_name()]
    await asyncio.sleep(0)  # its owner queues the first step

    owner.cancel()
    with pytest.raises(LoadCancelledError):
        await second
    held.release()
    await first

    assert loader.loads == ["a"]


async def test_transitions_are_logged_in_one_line_with_both_states(
    manager: AsyncModelManager, model_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    await manager.load_model(model_config())

    loaded = caplog.records[-1]
    assert loaded.getMessage().startswith("model a #1: loading -> ready after ")
    assert (loaded.event, loaded.model_id, loaded.old, loaded.new, loaded.reason) == (
        "model_transition",
        "a",
        "loading",
        "ready",
        "loaded",
    )


async def test_an_observer_that_fails_stops_nothing(
    manager: AsyncModelManager, model_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: TransitionEvent) -> None:
        raise ValueError(event.model_id)

    manager.on_transition.insert(0, broken)

    await manager.load_model(model_config())

    told = [m for m in caplog.messages if m.startswith("an observer of transitions failed\n")]
    assert len(told) == 2
    assert "ValueError: a" in told[0]


def test_limits_must_make_sense() -> None:
    with pytest.raises(ValueError, match="max_models must be at least 1, found 0"):
        AsyncModelManager(max_models=0, single_threaded=False)
    with pytest.raises(ValueError, match="max_workers must be at least 1, found 0"):
        AsyncModelManager(max_workers=0, single_threaded=False)


def test_threads_are_set_once_when_the_manager_is_made() -> None:
    before = torch.get_num_threads()
    try:
        AsyncModelManager(num_threads=2)
        assert torch.get_num_threads() == 2
        AsyncModelManager(single_threaded=False)
        assert torch.get_num_threads() == 2
        AsyncModelManager()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def _phase(manager: AsyncModelManager, model_id: str) -> LoadPhase | None:
    """Return what a load is at."""
    entry = manager.models.get(model_id)
    return entry.info().phase if entry is not None else None
