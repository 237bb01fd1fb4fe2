"""`kv_cache_memory`: reserved with a model, for its sessions, from admission to unload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from manager_fakes import FakeLoader

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.config import ModelConfig
from splitlearn_manager.errors import ConfigError, InsufficientResourcesError
from splitlearn_manager.serving.cache_memory import CacheMemory
from splitlearn_manager.serving.errors import NoMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.core.async_model_manager import AsyncModelManager

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


def reserved(manager: AsyncModelManager) -> int:
    return manager.resource_manager.get_current_usage().reserved_bytes


async def test_it_is_reserved_beside_the_weights_until_the_model_goes(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config(kv_cache_memory="200"))

    info = await manager.get_model_info("a")
    assert (info.resident_bytes, info.reserved_bytes) == (60, 260)
    assert (info.kv_cache_budget, info.kv_cache_bytes) == (200, 0)
    assert info.predicted_bytes == 60
    assert reserved(manager) == 260

    await manager.unload_model("a")
    assert reserved(manager) == 0


@pytest.mark.parametrize(
    ("estimate", "budget", "fits"),
    [
        (MemoryEstimate(1000, 60), 940, True),  # nobody has a cache at the load's worst moment
        (MemoryEstimate(100, 60), 940, True),
        (MemoryEstimate(100, 60), 941, False),
        (MemoryEstimate(1001, 60), 1, False),
    ],
)
async def test_admission_asks_for_the_worse_of_the_load_and_the_sessions(
    manager: AsyncModelManager,
    loader: FakeLoader,
    model_config: Config,
    estimate: MemoryEstimate,
    budget: int,
    fits: bool,
) -> None:
    loader.estimates["a"] = estimate
    config = model_config(kv_cache_memory=budget)
    if fits:
        await manager.load_model(config)
        assert reserved(manager) == 60 + budget
        return
    figures = rf"needs 100\d bytes .* {budget} bytes of it is for its sessions \(kv_cache_memory\)"
    with pytest.raises(InsufficientResourcesError, match=figures):
        await manager.load_model(config)
    assert reserved(manager) == 0
    assert loader.loads == []


async def test_sessions_take_from_it_and_from_nothing_else(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config(kv_cache_memory=100))
    memory = CacheMemory(manager.resource_manager)
    async with manager.use("a") as managed:
        memory.grow(managed, 70)
        assert reserved(manager) == 160
        assert (await manager.get_model_info("a")).kv_cache_bytes == 70

        figures = "31 bytes more, and sessions of 'a' have 70 bytes of the 100 bytes that"
        with pytest.raises(NoMemoryError, match=figures):
            memory.grow(managed, 31)
        memory.grow(managed, 30)
        assert memory.nbytes(managed) == 100

        memory.give_back(managed, 100)
        assert memory.nbytes(managed) == 0
        assert reserved(manager) == 160


async def test_without_it_sessions_take_what_is_free(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config())
    memory = CacheMemory(manager.resource_manager)
    async with manager.use("a") as managed:
        memory.grow(managed, 70)
        info = await manager.get_model_info("a")
        assert (info.kv_cache_budget, info.kv_cache_bytes, info.reserved_bytes) == (None, 70, 60)
        assert reserved(manager) == 130
        with pytest.raises(NoMemoryError):
            memory.grow(managed, 1000)
        memory.give_back(managed, 70)
    assert reserved(manager) == 60


async def test_what_a_model_takes_beyond_its_estimate_is_missing_for_its_sessions(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    loader.prepare("a", nbytes=90)
    await manager.load_model(model_config(kv_cache_memory=940))

    info = await manager.get_model_info("a")
    assert (info.kv_cache_budget, info.reserved_bytes) == (910, 1000)


async def test_each_load_of_a_reload_has_its_own(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config(kv_cache_memory=300))
    with pytest.raises(InsufficientResourcesError, match=r"kv_cache_memory\); to unload the old"):
        await manager.reload_model(model_config(kv_cache_memory=600))
    assert reserved(manager) == 360

    memory = CacheMemory(manager.resource_manager)
    async with manager.use("a") as old:
        memory.grow(old, 300)
        await manager.reload_model(model_config(kv_cache_memory=500))
        async with manager.use("a") as new:
            memory.grow(new, 400)
        assert reserved(manager) == 360 + 560
        memory.give_back(old, 300)
    await old.gone()

    assert reserved(manager) == 560
    assert (await manager.get_model_info("a")).kv_cache_bytes == 400
    memory.give_back(new, 400)


async def test_somebody_who_keeps_a_model_does_not_keep_its_sessions_memory(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config(kv_cache_memory=500))
    async with manager.use("a") as managed:
        kept = managed.model

    assert not await manager.unload_model("a")

    assert reserved(manager) == kept.nbytes == 60
    with pytest.raises(NoMemoryError):
        CacheMemory(manager.resource_manager).grow(managed, 1)
    del kept


def test_another_budget_is_another_load(model_config: Config) -> None:
    assert not model_config(kv_cache_memory=1).loads_like(model_config(kv_cache_memory=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_memory": "2 lots"}, "number of bytes, or a size"),
        ({"kv_cache_memory": -1}, "number of bytes, or a size"),
        ({"kv_cache_memory": True}, "number of bytes, or a size"),
        ({"kv_cache_memory": 0}, "more than 0"),
        ({"kv_cache_memory": 1, "config": {}}, "for a Trunk"),
        ({"kv_cache_memory": 1, "config": {"split_points": [1, 2], "component": "top"}}, "a Trunk"),
        (
            {
                "kv_cache_memory": 1,
                "model_type": "pipeline",
                "config": {"split_points": [1, 2], "trunk": "http://localhost:1"},
            },
            "for a Trunk",
        ),
    ],
)
def test_what_is_no_budget(model_config: Config, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"kv_cache_memory.*{message}"):
        model_config(**changes).validate()


def test_sizes_are_written_as_others(model_config: Config) -> None:
    assert model_config(kv_cache_memory="2GB").kv_cache_memory == 2 * 10**9
    assert model_config(kv_cache_memory="1.5 GiB").kv_cache_memory == 3 * 2**29
