"""Another configuration while the daemon runs: only what changed is touched."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import pytest
from manager_fakes import PATIENCE, FakeLoader, Watch, until
from serving_fakes import Served, trunk_config

from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.config import DaemonConfig, ManagerLimits, ServerConfig
from splitlearn_manager.config.changes import ConfigChanges
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import ConfigError, Problem
from splitlearn_manager.server.catalogue import Catalogue
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.server.desired_models import DesiredModels
from splitlearn_manager.server.readiness import Readiness
from splitlearn_manager.server.systemd import Notifier

pytestmark = pytest.mark.anyio


class Told(Notifier):
    """Notes what systemd would be told."""

    def __init__(self) -> None:
        super().__init__({"NOTIFY_SOCKET": "/"})
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    def _send(self, *lines: str) -> None:
        for line in lines:
            self.lines.put_nowait(line)

    async def until(self, line: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while not (await self.lines.get()).startswith(line):
                pass


class Bench:
    """A daemon whose configuration a test can change.

    Attributes:
        file: What the file says: a configuration, or why it is none.
    """

    def __init__(self, manager: AsyncModelManager, loader: FakeLoader, *models: Any) -> None:
        self.manager, self.loader = manager, loader
        self.file: DaemonConfig | ConfigError = self.config(*models)
        self.told = Told()
        lines: asyncio.Queue[str] = asyncio.Queue()
        self.daemon = Daemon(
            self.file,
            manager=manager,
            announce=lines.put_nowait,
            reread=self.read,
            notifier=self.told,
        )
        self.served = Served(self.daemon, asyncio.create_task(self.daemon.serve()), lines)

    @property
    def loads(self) -> list[str]:
        """The models that were loaded: those of one file in no order, they load side by side."""
        return sorted(self.loader.loads)

    @staticmethod
    def config(*models: Any, **sections: Any) -> DaemonConfig:
        named = tuple(trunk_config(m) if isinstance(m, str) else m for m in models)
        server = ServerConfig(**{"port": 0, "management": True, **sections.pop("server", {})})
        return DaemonConfig(server=server, models=named, **sections)

    def read(self) -> DaemonConfig:
        if isinstance(self.file, ConfigError):
            raise self.file
        return self.file

    async def hang_up(self, *models: Any, **sections: Any) -> None:
        """Change the file, and wait until the daemon has taken it."""
        self.file = self.config(*models, **sections)
        await self.hang_up_as_it_is()

    async def hang_up_as_it_is(self) -> None:
        self.daemon.reload()
        await self.told.until("RELOADING=1")
        await self.told.until("READY=1")

    def states(self) -> dict[str, ModelStatus]:
        return {name: entry.status for name, entry in self.manager.models.items()}


@pytest.fixture
async def start() -> Any:
    """Yield a function that starts a daemon with models."""
    made: list[Bench] = []

    async def begin(*models: Any) -> Bench:
        loader = FakeLoader()
        manager = AsyncModelManager(
            ResourceManager(memory_limit=1000), loader=loader, single_threaded=False
        )
        bench = Bench(manager, loader, *models)
        made.append(bench)
        await bench.served.line()
        await bench.served.line()
        await bench.told.until("STATUS=ready")
        return bench

    yield begin
    for bench in made:
        await bench.served.stop()


async def test_models_come_and_go(start: Any) -> None:
    bench = await start("a", "b")

    await bench.hang_up("b", "c")
    await until(lambda: bench.states() == {"b": ModelStatus.READY, "c": ModelStatus.READY})

    assert bench.loads == ["a", "b", "c"]
    assert (await bench.served.ask("/v2/repository/models/a")).status == 404
    assert (await bench.served.ask("/v2/health/ready")).status == 200


async def test_one_that_is_used_is_drained(start: Any) -> None:
    bench = await start("a")

    async with bench.manager.use("a") as used:
        await bench.hang_up()
        await until(lambda: bench.states() == {"a": ModelStatus.UNLOADING})
        assert await used(7) == 7
    await until(lambda: bench.states() == {})


@pytest.mark.parametrize("policy", ["load_first", "unload_first"])
async def test_one_that_changed_is_loaded_again_by_its_policy(start: Any, policy: str) -> None:
    bench = await start(trunk_config("a", reload=policy), "b")
    watch = Watch()
    bench.manager.on_transition.append(watch)

    await bench.hang_up(trunk_config("a", reload=policy, dtype="float16"), "b")
    await watch.until("a", "ready")

    assert bench.loads == ["a", "a", "b"]
    assert bench.manager.models["a"].config.dtype == "float16"
    assert watch.moves("b") == []
    first = {"load_first": "ready", "unload_first": "unloading"}[policy]
    assert watch.moves("a")[0] == ("ready", first)


async def test_what_needs_no_load_is_adopted(start: Any) -> None:
    bench = await start("a")

    await bench.hang_up(trunk_config("a", pinned=True, preload=False))
    await until(lambda: bench.manager.models["a"].config.pinned)

    assert bench.loads == ["a"]
    answer = await bench.served.ask("/v2/repository/models/a/load", "POST")
    assert (answer.status, bench.loader.loads) == (200, ["a"])


async def test_one_that_is_to_be_preloaded_only_now_is_loaded(start: Any) -> None:
    bench = await start("a?")
    assert bench.loads == []

    await bench.hang_up("a")

    await until(lambda: bench.states() == {"a": ModelStatus.READY})


async def test_a_load_of_what_has_changed_gives_way(start: Any) -> None:
    bench = await start("a")
    held = bench.loader.hold("b")
    await bench.hang_up("a", "b")
    await held.started()
    held.listens = False

    await bench.hang_up("a", trunk_config("b", dtype="float16"))
    await until(lambda: bench.states().get("b") is ModelStatus.READY)
    held.release()

    assert bench.manager.models["b"].config.dtype == "float16"


async def test_the_last_of_several_wishes_holds(start: Any) -> None:
    bench = await start("a")
    held = bench.loader.hold("a")
    await bench.hang_up(trunk_config("a", dtype="float16"))
    await held.started()

    await bench.hang_up(trunk_config("a", dtype="bfloat16"))
    await bench.hang_up()
    held.release()

    await until(lambda: bench.states() == {})


async def test_what_failed_is_tried_again(start: Any) -> None:
    bench = await start("a")
    bench.loader.prepare("b", OSError("disk"))
    await bench.hang_up("a", "b")
    await until(lambda: bench.states().get("b") is ModelStatus.FAILED)
    assert (await bench.served.ask("/v2/health/ready")).status == 503

    await bench.hang_up_as_it_is()

    await until(lambda: bench.states().get("b") is ModelStatus.READY)
    assert bench.loads == ["a", "b", "b"]
    assert (await bench.served.ask("/v2/health/ready")).status == 200


async def test_what_was_unloaded_on_purpose_stays_so(start: Any) -> None:
    bench = await start("a")
    await bench.manager.unload_model("a")

    await bench.hang_up("a", "b")
    await until(lambda: bench.states() == {"b": ModelStatus.READY})

    assert bench.loads == ["a", "b"]


async def test_limits_change_and_what_can_not_is_named(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # and is given back at the end
    bench = await start("a")
    limits = ManagerLimits(max_models=1, max_workers=9, memory_limit=500, load_attempts=7)

    await bench.hang_up("a", manager=limits, server={"max_sessions": 3, "log_level": "warning"})

    assert bench.manager.max_models == 1
    assert bench.manager.resource_manager.capacity() == 500
    assert bench.manager._loads.policy.retry.attempts == 7
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned[-1] == (
        "until the next start these stay as they were: server.max_sessions, manager.max_workers"
    )


async def test_an_invalid_file_changes_nothing(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = await start("a")
    bench.file = ConfigError(
        Problem("unknown key", ("models", 0, "modle_path"), "daemon.yaml", 7),
        Problem("must be 1 or more", ("manager", "max_models"), "daemon.yaml", 3),
    )

    await bench.hang_up_as_it_is()

    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [
        "the configuration stays as it was: daemon.yaml:7: models[0].modle_path: unknown key",
        "the configuration stays as it was: daemon.yaml:3: manager.max_models: must be 1 or more",
    ]
    assert bench.states() == {"a": ModelStatus.READY}
    assert (await bench.served.ask("/v2/health/ready")).status == 200


async def test_a_bug_in_reading_changes_nothing(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = await start("a")
    bench.daemon._reread = lambda: 1 / 0

    await bench.hang_up_as_it_is()

    assert "nothing was changed" in caplog.records[-1].getMessage()
    assert bench.states() == {"a": ModelStatus.READY}


async def test_without_a_file_there_is_nothing_to_read(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = await start("a")
    bench.daemon._reread = None

    await bench.hang_up_as_it_is()

    assert "without a file" in caplog.records[-1].getMessage()


async def test_the_end_comes_while_models_are_brought(start: Any) -> None:
    bench = await start("a")
    held = bench.loader.hold("b")
    await bench.hang_up("b")
    await held.started()

    stopping = asyncio.create_task(bench.served.stop())
    await until(bench.daemon._stop.is_set)
    held.release()

    assert await stopping == 0


async def test_once_the_end_has_begun_the_file_is_not_read_again(start: Any) -> None:
    bench = await start("a")
    held = bench.loader.hold("b")
    await bench.hang_up("a", "b")
    await held.started()
    bench.file = bench.config("a", "b", "c")

    bench.daemon.stop()
    bench.daemon.reload()
    held.release()
    await bench.served.stop()

    told = [bench.told.lines.get_nowait() for _ in range(bench.told.lines.qsize())]
    assert "STOPPING=1" in told
    assert "RELOADING=1" not in told
    assert bench.loads == ["a", "b"]


@pytest.mark.filterwarnings("error")
async def test_the_end_comes_before_a_step_has_begun() -> None:
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1000), loader=FakeLoader(), single_threaded=False
    )
    catalogue = Catalogue([trunk_config("a")])
    desired = DesiredModels(manager, catalogue, Readiness(manager, catalogue))

    desired.follow(ConfigChanges(added=(trunk_config("a"),)))
    await desired.close()
    gc.collect()

    assert manager.models == {}
    await manager.shutdown()
