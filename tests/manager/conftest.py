"""Managers with a loader whose loads end when the test says so."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import PATIENCE, FakeLoader, Watch

from splitlearn_manager.config import ModelConfig
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.resources import ResourceManager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@pytest.fixture
def model_config() -> Callable[..., ModelConfig]:
    """Return a function that makes the configuration of a Trunk for the fake loader."""

    def make(model_id: str = "a", **changes: Any) -> ModelConfig:
        values = {"config": {"component": "trunk", "split_points": [2, 6]}, **changes}
        return ModelConfig(model_id, "nowhere", **values)

    return make


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def resources() -> ResourceManager:
    """Return room for ten models of the usual peak, whatever the machine has."""
    return ResourceManager(memory_limit=1000)


@pytest.fixture
async def make_manager(
    loader: FakeLoader, resources: ResourceManager
) -> AsyncIterator[Callable[..., AsyncModelManager]]:
    """Return a function that makes managers, which must hold nothing when the test is over."""
    made: list[AsyncModelManager] = []

    def make(**changes: Any) -> AsyncModelManager:
        values = {"resource_manager": resources, "loader": loader, "single_threaded": False}
        made.append(AsyncModelManager(**{**values, **changes}))
        return made[-1]

    yield make
    for manager in made:
        await manager.shutdown()
    for manager in made:
        _check_nothing_left(manager)


@pytest.fixture
async def manager(make_manager: Callable[..., AsyncModelManager]) -> AsyncModelManager:
    return make_manager()


@pytest.fixture
async def watch(manager: AsyncModelManager) -> Watch:
    watch = Watch()
    manager.on_transition.append(watch)
    return watch


def _check_nothing_left(manager: AsyncModelManager) -> None:
    """Check that a manager that was shut down holds nothing."""
    assert manager.models == {}
    assert not manager._owners
    for thread in threading.enumerate():
        if thread.name.startswith("splitlearn-"):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread.name
    for device in manager.resource_manager.devices():
        assert manager.resource_manager.get_current_usage(device).reserved_bytes == 0
