"""The life of the process, in this event loop and in a process of its own."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_fakes import ask, trunk_config

from splitlearn_manager import AsyncModelManager, ServerConfig
from splitlearn_manager.client import RemoteSessionClosed, RemoteTrunk
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.server import daemon as daemon_module
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.server.http_server import HttpServer
from splitlearn_manager.server.listener import listen, url_of

anyio = pytest.mark.anyio


def config(*model_ids: str, **server: Any) -> DaemonConfig:
    return DaemonConfig(
        server=ServerConfig(**{"port": 0, **server}), models=tuple(map(trunk_config, model_ids))
    )


# --- The port --------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = Daemon(config("trunk", port=port))

        with pytest.raises(ConfigError, match=rf"listen on 127\.0\.0\.1:{port}: Address already"):
            daemon.bind()

    assert daemon._manager is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", "x" * 64])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:0: "):
        listen(host, 0)


def test_port_0_takes_a_free_one() -> None:
    with Daemon(config()) as daemon:
        port = int(daemon.url.rpartition(":")[2])

        assert daemon.url == f"http://127.0.0.1:{port}"
        assert port > 0


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_has_brackets(host: str) -> None:
    with listen(host, 0) as sock:
        assert url_of(sock).startswith("http://[::1]:")


# --- Start -----------------------------------------------------------------------------------


@anyio
async def test_it_answers_while_models_load(serve: Any, loader: Any) -> None:
    loader.gate.clear()
    served = await serve("late")

    live, ready = await served.ask("/v2/health/live"), await served.ask("/v2/health/ready")
    loader.gate.set()
    await served.line()

    assert served.lines == [
        f"splitlearn: listening on {served.url}",
        "splitlearn: ready (1 model)",
    ]
    assert live.status == 200
    assert (ready.status, ready.json["ready"]) == (503, False)
    assert ready.json["error"].startswith("model 'late' is loading")
    assert (await served.ask("/v2/health/ready")).status == 200


@anyio
async def test_a_model_that_fails_is_told_and_the_others_serve(serve: Any) -> None:
    served = await serve("broken", "other")

    assert await served.line() == "splitlearn: not ready, loaded 1 of 2 models; the log says why"
    ready = await served.ask("/v2/health/ready")
    assert ready.status == 503
    assert "'broken' failed to load: ValueError: the weights are cut off" in ready.json["error"]
    assert (await served.ask("/v2/models/other/ready")).status == 200


@anyio
async def test_a_model_for_which_there_is_no_place_keeps_the_daemon_unready(
    serve: Any, manager: AsyncModelManager
) -> None:
    manager.max_models = 1
    served = await serve("other")

    assert (await served.line()).startswith("splitlearn: not ready")
    ready = await served.ask("/v2/health/ready")
    assert ready.status == 503
    assert "'other' was not loaded" in ready.json["error"]


@anyio
async def test_a_model_that_was_unloaded_on_purpose_does_not(
    serve: Any, manager: AsyncModelManager
) -> None:
    served = await serve("other")
    await served.line()

    await manager.unload_model("other")

    assert (await served.ask("/v2/health/ready")).status == 200


# --- End -------------------------------------------------------------------------------------


@anyio
async def test_stopping_before_it_runs_is_stopping(manager: AsyncModelManager) -> None:
    daemon = Daemon(config(), manager=manager, announce=lambda _: None)
    daemon.stop()

    assert await daemon.serve() == 0


@anyio
async def test_nothing_is_left_at_the_end(serve: Any, manager: AsyncModelManager) -> None:
    tasks = asyncio.all_tasks()
    served = await serve("other")
    await served.line()
    await served.ask("/v2")

    assert await served.stop() == 0

    assert asyncio.all_tasks() <= tasks
    assert manager.models == {}
    with pytest.raises(ConnectionRefusedError):
        await served.ask("/v2")


@anyio
async def test_a_load_under_way_does_not_hold_the_end_for_long(serve: Any, loader: Any) -> None:
    """The load's thread can't be ended; it is left behind."""
    loader.gate.clear()
    served = await serve("late", drain_timeout=600)

    assert await served.stop() == 0


@anyio
async def test_every_stage_of_the_end_has_its_time(
    serve: Any, manager: AsyncModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is never completed may use up its own time, not that of the models."""
    given: list[float] = []

    def stop(http: HttpServer, grace: float) -> None:
        given.append(grace)
        end(http, 0)

    async def shutdown(seconds: float | None = None) -> None:
        given.append(seconds or 0)
        await close(seconds)

    end, close = HttpServer.stop, manager.shutdown
    monkeypatch.setattr(HttpServer, "stop", stop)
    monkeypatch.setattr(manager, "shutdown", shutdown)
    served = await serve(drain_timeout=20)

    assert await served.stop() == 0

    http, models, *_ = given
    assert 10 < http <= 18.5
    assert http < models <= 19


class ClosedPipe(io.StringIO):
    """A stdout that nobody reads any more."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_nobody_need_listen_to_what_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedPipe())

    daemon_module._say("splitlearn: ready")
    daemon_module._say("splitlearn: and again")

    assert [record.message for record in caplog.records] == [
        "could not print 'splitlearn: ready': [Errno 32] Broken pipe"
    ]


@anyio
async def test_a_connection_that_is_kept_alive_does_not_hold_the_end(serve: Any) -> None:
    served = await serve()
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /v2 HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    await reader.readuntil(b"}")

    assert await served.stop() == 0

    assert await reader.read() == b""
    writer.close()


def test_run_sets_up_logging_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        daemon_module,
        "configure_logging",
        lambda *args, access_log: levels.append((*args, access_log)),
    )
    monkeypatch.setattr(daemon_module.Daemon, "run", lambda self: self.stop() or 7)

    assert daemon_module.run(config(log_level="debug")) == 7
    assert levels == [("debug", "text", False)]


# --- A process of its own --------------------------------------------------------------------


class Child:
    """A daemon in a process of its own, whose forwards wait for a line on its stdin."""

    def __init__(self) -> None:
        support = Path(__file__).parents[1] / "support"
        self.process = subprocess.Popen(
            [sys.executable, str(support / "daemon_child.py"), "600"],  # seconds for a drain
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        first, second = self.line(), self.line()
        assert second == "splitlearn: ready (1 model)"
        self.url = first.removeprefix("splitlearn: listening on ")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def let_forward_go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_tells_idle_sessions_and_answers_busy_ones(child: Child, number: int) -> None:
    with RemoteTrunk(child.url, "trunk", retry=None) as trunk, ThreadPoolExecutor() as pool:
        idle, busy = trunk.new_cache(), trunk.new_cache()
        step = pool.submit(trunk, torch.ones(1, 1, 4), past_key_values=idle)
        assert child.line() == "forward"
        child.let_forward_go_on()
        step.result(30)
        step = pool.submit(trunk, torch.ones(1, 1, 4), past_key_values=busy)
        assert child.line() == "forward"

        child.process.send_signal(number)
        while ask(child.url, "/v2/health/ready").status == 200:
            pass
        assert ask(child.url, "/v2/health/live").status == 200
        child.let_forward_go_on()

        assert torch.equal(step.result(30), torch.full((1, 1, 4), 2.0))
        assert child.process.wait(60) == 0
        with pytest.raises(RemoteSessionClosed) as caught:
            trunk(torch.ones(1, 1, 4), past_key_values=idle)
        assert caught.value.reason == "draining"


def test_a_second_signal_ends_at_once(child: Child) -> None:
    with RemoteTrunk(child.url, "trunk", retry=None) as trunk, ThreadPoolExecutor() as pool:
        step = pool.submit(trunk, torch.ones(1, 1, 4))
        assert child.line() == "forward"

        child.process.send_signal(signal.SIGTERM)
        while ask(child.url, "/v2/health/ready").status == 200:
            pass
        child.process.send_signal(signal.SIGTERM)

        assert child.process.wait(60) == -signal.SIGTERM
        with pytest.raises(ConnectionError):
            step.result(30)


@anyio
async def test_signals_of_the_process_are_given_back(serve: Any) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    served = await serve()
    during = signal.getsignal(signal.SIGTERM)

    await served.stop()

    assert during == served.daemon._on_signal
    assert signal.getsignal(signal.SIGTERM) is before
