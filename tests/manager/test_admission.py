"""Who gets memory next, who waits for it, and who goes for it."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from manager_fakes import PATIENCE, FakeLoader, Watch, until

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_core.machine import Memory
from splitlearn_manager.core.admission import Admission
from splitlearn_manager.core.events import ProgressEvent
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.states import LoadPhase, ModelStatus
from splitlearn_manager.errors import InsufficientResourcesError, ModelUnloadingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager

    Config = Callable[..., ModelConfig]
    Make = Callable[..., AsyncModelManager]

pytestmark = pytest.mark.anyio


def waits(manager: AsyncModelManager, model_id: str) -> Callable[[], bool]:
    """Return whether a load waits for memory."""

    def is_waiting() -> bool:
        load = manager._table.load_under_way(model_id)
        return load is not None and load.progress.phase is LoadPhase.WAITING_FOR_MEMORY

    return is_waiting


async def load(
    manager: AsyncModelManager,
    loader: FakeLoader,
    config: ModelConfig,
    steady: int,
    peak: int | None = None,
) -> None:
    """Load a model of a size."""
    loader.estimates[config.model_id] = MemoryEstimate(peak or steady, steady)
    loader.prepare(config.model_id, nbytes=steady)
    await manager.load_model(config)


async def test_a_load_waits_for_an_unload_that_is_under_way(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await load(manager, loader, model_config("old"), 900)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        loader.estimates["new"] = MemoryEstimate(500, 400)
        new = asyncio.create_task(manager.load_model(model_config("new")))
        await until(waits(manager, "new"))
        assert loader.loads == ["old"]

    assert await asyncio.gather(unload, new) == [True, True]


async def test_a_load_waits_for_another_to_be_past_its_worst(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["first"] = MemoryEstimate(900, 300)
    held = loader.hold("first", nbytes=300)
    first = asyncio.create_task(manager.load_model(model_config("first")))
    await held.started()
    loader.estimates["second"] = MemoryEstimate(700, 60)
    second = asyncio.create_task(manager.load_model(model_config("second")))
    await until(waits(manager, "second"))

    held.release()

    assert await asyncio.gather(first, second) == [True, True]


async def test_a_load_waits_for_one_that_then_fails(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["first"] = MemoryEstimate(900, 900)
    held = loader.hold("first", MemoryError("no"))
    first = asyncio.create_task(manager.load_model(model_config("first")))
    await held.started()
    loader.estimates["second"] = MemoryEstimate(950, 60)
    second = asyncio.create_task(manager.load_model(model_config("second")))
    await until(waits(manager, "second"))

    held.release()

    results = await asyncio.gather(first, second, return_exceptions=True)
    assert results[1] is True


async def test_a_load_that_waits_says_so_in_the_stream(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await load(manager, loader, model_config("old"), 900)
    with manager.subscribe() as events:
        async with manager.use("old"):
            unload = asyncio.create_task(manager.unload_model("old"))
            new = asyncio.create_task(load(manager, loader, model_config("new"), 500))
            async with asyncio.timeout(PATIENCE):
                async for event in events:
                    if isinstance(event, ProgressEvent) and event.phase == "waiting_for_memory":
                        break

        assert (event.model_id, event.bytes_total) == ("new", 500)
        await asyncio.gather(unload, new)


async def test_what_waits_for_a_model_that_somebody_keeps_is_refused_then(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await load(manager, loader, model_config("old"), 900)
    kept = manager.models["old"].model  # type: ignore[union-attr]
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        new = asyncio.create_task(load(manager, loader, model_config("new"), 500))
        await until(waits(manager, "new"))

    assert await unload is False
    with pytest.raises(InsufficientResourcesError, match="reserved \\(old 900 bytes\\)"):
        await asyncio.wait_for(new, PATIENCE)
    del kept


async def test_where_one_is_kept_another_is_evicted_for_who_waits(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True)
    await load(manager, loader, model_config("old"), 450)
    await load(manager, loader, model_config("idle"), 450)
    kept = manager.models["old"].model  # type: ignore[union-attr]
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        new = asyncio.create_task(load(manager, loader, model_config("new"), 500))
        await until(waits(manager, "new"))

    assert await unload is False
    await asyncio.wait_for(new, PATIENCE)
    assert set(manager.models) == {"new"}
    del kept


async def test_what_waits_for_a_load_that_grew_to_its_estimate_is_refused_then(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.estimates["first"] = MemoryEstimate(900, 900)
    held = loader.hold("first", nbytes=900)
    first = asyncio.create_task(manager.load_model(model_config("first")))
    await held.started()
    second = asyncio.create_task(load(manager, loader, model_config("second"), 200))
    await until(waits(manager, "second"))

    held.release()
    await first

    with pytest.raises(InsufficientResourcesError, match="reserved \\(first 900 bytes\\)"):
        await second


async def test_nobody_overtakes_a_load_that_waits(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await load(manager, loader, model_config("old"), 600)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        loader.estimates["large"] = MemoryEstimate(900, 900)
        large = asyncio.create_task(load(manager, loader, model_config("large"), 900))
        await until(waits(manager, "large"))
        small = asyncio.create_task(load(manager, loader, model_config("small"), 100))
        await until(waits(manager, "small"))
        assert manager.resource_manager.check_available_resources(100)

    assert await unload is True
    await asyncio.gather(large, small)
    assert loader.loads == ["old", "large", "small"]


async def test_devices_have_queues_of_their_own(
    loader: FakeLoader, model_config: Config, make_manager: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "splitlearn_manager.core.resources.cuda_memory", lambda _: Memory(1000, 1000)
    )
    manager = make_manager()
    await load(manager, loader, model_config("old"), 900)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        waiting = asyncio.create_task(load(manager, loader, model_config("cpu"), 900))
        await until(waits(manager, "cpu"))
        await load(manager, loader, model_config("cuda", device="cuda:0"), 500)

    assert await unload is True
    await waiting


async def test_a_load_that_gives_up_waiting_lets_the_next_one_through(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await load(manager, loader, model_config("old"), 600)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        large = asyncio.create_task(load(manager, loader, model_config("large"), 900))
        await until(waits(manager, "large"))
        small = asyncio.create_task(load(manager, loader, model_config("small"), 100))
        await until(waits(manager, "small"))

        assert await manager.cancel_load("large") is True
        await small

    assert await unload is True
    with pytest.raises(Exception, match="cancelled"):
        await large


async def test_what_can_never_fit_is_refused_at_once_and_nobody_goes_for_it(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True)
    await load(manager, loader, model_config("idle"), 100)
    await load(manager, loader, model_config("old"), 100)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        await until(lambda: manager.models["old"].status is ModelStatus.UNLOADING)

        with pytest.raises(InsufficientResourcesError, match="needs 1001 bytes"):
            await load(manager, loader, model_config("huge"), 1001)

        assert manager.models["idle"].status is ModelStatus.READY
    assert await unload is True


async def test_patience_has_an_end_and_says_so(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(memory_patience=0.01)
    await load(manager, loader, model_config("old"), 900)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))

        with pytest.raises(InsufficientResourcesError, match=r"waited 0.01 s for what is being"):
            await load(manager, loader, model_config("new"), 500)

    assert await unload is True


async def test_idle_models_go_the_least_recently_used_first(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True)
    watch = Watch()
    manager.on_transition.append(watch)
    for model_id in ("a", "b", "c"):
        await load(manager, loader, model_config(model_id), 300)
    await manager.infer("a", 1)

    await load(manager, loader, model_config("new"), 500)

    assert sorted(manager.models) == ["a", "new"]
    gone = [e for e in watch.events if e.new is ModelStatus.UNLOADING]
    assert [(e.model_id, e.code) for e in gone] == [("b", "evicted"), ("c", "evicted")]
    assert gone[0].reason == "evicted to make room for new"


async def test_without_eviction_nobody_goes(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    await load(manager, loader, model_config("idle"), 900)

    with pytest.raises(InsufficientResourcesError):
        await load(manager, loader, model_config("new"), 500)

    assert manager.models["idle"].status is ModelStatus.READY


async def test_nobody_goes_who_is_needed(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True, max_models=10)
    for model_id in ("used", "held", "reloading"):
        await load(manager, loader, model_config(model_id), 150)
    await load(manager, loader, model_config("pinned", pinned=True), 150)
    hold = manager.models["held"].hold(lambda _: None)
    successor = loader.hold("reloading", nbytes=150)
    reload = asyncio.create_task(manager.reload_model(model_config("reloading")))
    await successor.started()
    manager._table.successors["reloading"].reservation.resize(100)  # past its worst moment
    loading = loader.hold("loading")
    begun = await manager.start_load(model_config("loading"))
    await loading.started()
    begun.reservation.resize(100)
    before = {info.model_id: info.status for info in await manager.list_models()}

    async with manager.use("used"):
        with pytest.raises(InsufficientResourcesError, match="needs 400 bytes"):
            await load(manager, loader, model_config("new"), 400)

    assert {i.model_id: i.status for i in await manager.list_models() if i.error is None} == before
    hold.release()
    successor.release()
    loading.release()
    await reload
    await begun.outcome()


async def test_an_idle_model_of_another_device_does_not_go(
    make_manager: Make, loader: FakeLoader, model_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "splitlearn_manager.core.resources.cuda_memory", lambda _: Memory(1250, 1250)
    )
    manager = make_manager(eviction=True)
    await load(manager, loader, model_config("far", device="cuda:0"), 900)
    await load(manager, loader, model_config("near"), 900)

    await load(manager, loader, model_config("new"), 900)

    assert sorted(manager.models) == ["far", "new"]


async def test_at_max_models_the_least_recently_used_goes_at_once(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True, max_models=2)
    for model_id in ("a", "b"):
        await load(manager, loader, model_config(model_id), 100)
    await manager.infer("a", 1)

    await load(manager, loader, model_config("c"), 100)
    await until(lambda: "b" not in manager.models)

    assert sorted(manager.models) == ["a", "c"]


async def test_at_max_models_loads_at_once_evict_one_each(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True, max_models=3)
    for model_id in ("a", "b", "c"):
        await load(manager, loader, model_config(model_id), 100)

    await asyncio.gather(*(load(manager, loader, model_config(m), 100) for m in ("d", "e")))
    await until(lambda: len(manager.models) == 3)

    assert sorted(manager.models) == ["c", "d", "e"]


async def test_at_max_models_with_all_in_use_a_load_is_refused_and_changes_nothing(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True, max_models=1)
    await load(manager, loader, model_config("a"), 100)
    watch = Watch()
    manager.on_transition.append(watch)

    async with manager.use("a"):
        with pytest.raises(InsufficientResourcesError, match="max_models is 1, and there are a"):
            await load(manager, loader, model_config("b"), 100)

    assert watch.events == []


async def test_what_is_evicted_says_so_to_who_wants_it(
    make_manager: Make, loader: FakeLoader, model_config: Config
) -> None:
    manager = make_manager(eviction=True, max_models=1)
    await load(manager, loader, model_config("a"), 100)
    release = threading.Event()
    busy = asyncio.create_task(manager.models["a"].run(release.wait, PATIENCE))  # no lease
    await asyncio.sleep(0)
    new = asyncio.create_task(load(manager, loader, model_config("b"), 100))
    await until(lambda: manager.models["a"].status is ModelStatus.UNLOADING)

    with pytest.raises(ModelUnloadingError):
        await manager.infer("a", 1)
    release.set()
    await asyncio.gather(busy, new)


async def test_memory_that_others_give_back_is_seen_while_waiting(
    model_config: Config, make_manager: Make, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = [Memory(2000, 1200)]
    monkeypatch.setattr("splitlearn_manager.core.resources.host_memory", lambda: machine[0])
    manager = make_manager(resource_manager=ResourceManager(max_memory_percent=100))
    await load(manager, loader, model_config("old"), 100)
    machine[0] = Memory(2000, 300)
    async with manager.use("old"):
        unload = asyncio.create_task(manager.unload_model("old"))
        new = asyncio.create_task(load(manager, loader, model_config("new"), 900))
        await until(waits(manager, "new"))
        machine[0] = Memory(2000, 1000)

    assert await unload is True
    await new


async def test_the_gate_forgets_whoever_left() -> None:
    class NoEvictor:
        def evict_for(self, *_: object) -> bool:
            return False

    resources = ResourceManager(memory_limit=100)
    held = resources.reserve("old", 100)
    admission = Admission(resources, asyncio.Lock(), NoEvictor(), patience=PATIENCE)
    asks = [
        asyncio.create_task(admission.reserve(str(n), 10, "cpu", Memory(1, 1))) for n in range(3)
    ]
    await until(lambda: len(resources.on_change) == 3)
    for ask in asks[:2]:
        ask.cancel()
    held.release()

    results = await asyncio.gather(*asks, return_exceptions=True)

    assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, True, False]
    assert resources.on_change == []
    assert resources.get_current_usage().reservations == {"2": 10}
