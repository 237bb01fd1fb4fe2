from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from manager_fakes import PATIENCE, until

from splitlearn_manager.errors import (
    DrainTimeoutError,
    ManagerClosedError,
    ModelFailedError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager_fakes import FakeLoader, Watch

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


async def test_everything_goes_and_nothing_more_comes(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    await manager.load_model(model_config("a"))
    loader.prepare("b", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.load_model(model_config("b"))

    await manager.shutdown()

    assert await manager.list_models() == []
    assert watch.moves("a")[-2:] == [("ready", "unloading"), ("unloading", None)]
    assert watch.moves("b")[-1] == ("failed", None)
    for ask in (
        manager.load_model(model_config("c")),
        manager.ensure_model(model_config("c")),
        manager.get_model("a"),
        manager.infer("a", 1),
    ):
        with pytest.raises(ManagerClosedError):
            await ask


async def test_leaving_the_block_shuts_down(
    make_manager: Callable[..., AsyncModelManager], model_config: Config
) -> None:
    async with make_manager() as manager:
        await manager.load_model(model_config())

    assert manager.models == {}


async def test_shutdown_is_one_however_often_it_is_called(
    manager: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    await manager.load_model(model_config())
    async with manager.use("a"):
        calls = [asyncio.create_task(manager.shutdown()) for _ in range(3)]
        await watch.until("a", "unloading")
        calls[0].cancel()

    results = await asyncio.gather(*calls, return_exceptions=True)
    await manager.shutdown()

    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]
    assert watch.moves("a").count(("unloading", None)) == 1


async def test_a_running_load_is_ended_and_its_caller_is_told(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    shutdown = asyncio.create_task(manager.shutdown())
    await asyncio.sleep(0)  # it asks
    held.release()

    with pytest.raises(ManagerClosedError, match="the manager shut down during the load"):
        await load
    await shutdown

    assert watch.moves("a") == [(None, "loading"), ("loading", "failed"), ("failed", None)]


async def test_what_a_loader_that_does_not_listen_brings_is_closed_and_not_shown_ready(
    manager: AsyncModelManager, loader: FakeLoader, watch: Watch, model_config: Config
) -> None:
    held = loader.hold("a")
    held.listens = False
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    shutdown = asyncio.create_task(manager.shutdown())
    await asyncio.sleep(0)  # it asks
    held.release()

    with pytest.raises(ManagerClosedError):
        await load
    await shutdown

    assert ("loading", "ready") not in watch.moves("a")
    await until(lambda: held.closed is not None and held.closed.is_set())


async def test_a_load_that_hangs_is_not_waited_for_until_the_deadline(
    manager: AsyncModelManager,
    loader: FakeLoader,
    model_config: Config,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("splitlearn_manager.core.loads._SEE_OFF", 0.01)
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await held.started()
    work = manager.models["a"].work

    await asyncio.wait_for(manager.shutdown(drain_timeout=3600), PATIENCE)

    with pytest.raises(ManagerClosedError):
        await load
    assert manager.models == {}
    assert (
        "the load of model a has ended, its thread has not yet, and is left behind"
        in caplog.messages
    )
    assert manager.resource_manager.get_current_usage().reserved_bytes == 100
    released = asyncio.Event()
    loop = asyncio.get_running_loop()
    work.add_done_callback(lambda _: loop.call_soon_threadsafe(released.set))
    held.release()
    await released.wait()


async def test_a_use_that_does_not_end_is_given_up_at_the_deadline(
    manager: AsyncModelManager, model_config: Config
) -> None:
    await manager.load_model(model_config())

    async def use() -> None:
        async with manager.use("a") as managed:
            await managed(1)  # so that it has a thread, which must end too
            begun.set()
            await asyncio.Event().wait()

    begun = asyncio.Event()
    managed = await manager.get_model("a")
    assert managed is not None
    closed = managed.model.closed
    user = asyncio.create_task(use())
    await begun.wait()
    await manager.shutdown(drain_timeout=0)

    with pytest.raises(DrainTimeoutError, match="had not ended at the deadline"):
        await user
    assert manager.models == {}
    assert await asyncio.to_thread(closed.wait, 30)
    with pytest.raises(ModelUnloadingError, match="model 'a' was unloaded"):
        await managed(2)


async def test_an_unload_in_flight_is_waited_for(
    manager: AsyncModelManager, watch: Watch, model_config: Config
) -> None:
    await manager.load_model(model_config())
    async with manager.use("a"):
        unload = asyncio.create_task(manager.unload_model("a"))
        await watch.until("a", "unloading")
        shutdown = asyncio.create_task(manager.shutdown())
        await asyncio.sleep(0)  # it begins

    assert await unload is True
    await shutdown


async def test_a_wrong_deadline_shuts_nothing_down(manager: AsyncModelManager) -> None:
    with pytest.raises(ValueError, match="a timeout must be 0 seconds or more, found -1"):
        await manager.shutdown(drain_timeout=-1)

    assert await manager.list_models() == []


def test_a_load_that_hangs_does_not_keep_the_process_alive() -> None:
    program = """
        import asyncio, threading
        from splitlearn_core.estimate import MemoryEstimate
        from splitlearn_manager import AsyncModelManager, ModelConfig

        class Hanging:
            def estimate(self, config):
                return MemoryEstimate(1, 1)
            def load_from_config(self, config, progress=None):
                started.set()
                threading.Event().wait()

        async def main():
            manager = AsyncModelManager(loader=Hanging(), single_threaded=False)
            asyncio.create_task(manager.load_model(ModelConfig("a", "nowhere")))
            await asyncio.to_thread(started.wait)
            await manager.shutdown(drain_timeout=0)

        started = threading.Event()
        asyncio.run(main())
        print("done")
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
