"""A manager with a fake Trunk, and daemons over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from serving_fakes import FakeLoader, FakePart, Served, trunk_config

from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.config import DaemonConfig, ServerConfig
from splitlearn_manager.server.daemon import Daemon


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
async def manager(loader: FakeLoader) -> AsyncIterator[AsyncModelManager]:
    """Yield a manager with the model `trunk`."""
    resources = ResourceManager(memory_limit=1 << 20)
    async with AsyncModelManager(resources, loader=loader, single_threaded=False) as manager:
        await manager.load_model(trunk_config("trunk"))
        yield manager
        loader.parts.clear()  # the manager collects garbage when a model outlives its unload


@pytest.fixture
def part(manager: AsyncModelManager, loader: FakeLoader) -> FakePart:
    """Return the model `trunk` itself."""
    del manager
    return loader.parts["trunk"]


@pytest.fixture
async def serve(manager: AsyncModelManager, loader: FakeLoader) -> AsyncIterator[Any]:
    """Yield a function that starts a daemon on a free port, over the manager with a `trunk`."""
    running: list[Served] = []

    async def start(*model_ids: str, **server: Any) -> Served:
        config = DaemonConfig(
            server=ServerConfig(**{"port": 0, **server}),
            models=tuple(map(trunk_config, model_ids)),
        )
        lines: asyncio.Queue[str] = asyncio.Queue()
        daemon = Daemon(config, manager=manager, announce=lines.put_nowait)
        served = Served(daemon, asyncio.create_task(daemon.serve()), lines)
        running.append(served)
        await served.line()
        return served

    yield start
    loader.gate.set()
    loader.parts.clear()
    for served in running:
        if not served.serving.done():
            await served.stop()
