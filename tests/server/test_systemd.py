"""sd_notify over real sockets, and the unit file."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from manager_fakes import until
from serving_fakes import trunk_config

from splitlearn_manager import AsyncModelManager
from splitlearn_manager.config import DaemonConfig, ServerConfig
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.server.systemd import Notifier, keep_watchdog

UNIT = Path(__file__).parents[2] / "configs" / "splitlearn.service"


class ServiceManager:
    """The other end of the socket."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(b"\0" + name[1:].encode() if name.startswith("@") else name)
        self.socket.settimeout(10)

    def notifier(self, **environ: str) -> Notifier:
        return Notifier({"NOTIFY_SOCKET": self.name, **environ})

    def told(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")


@pytest.fixture(params=["path", "abstract"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    path = request.param == "path"
    system = ServiceManager(str(tmp_path / "notify") if path else f"@{secrets.token_hex(8)}")
    yield system
    system.socket.close()


def test_what_systemd_is_told(system: ServiceManager) -> None:
    notifier = system.notifier()

    notifier.ready("serving")
    assert system.told() == ["READY=1", "STATUS=serving"]
    notifier.status("loading")
    assert system.told() == ["STATUS=loading"]
    notifier.stopping()
    assert system.told() == ["STOPPING=1", "STATUS=draining"]
    notifier.alive()
    assert system.told() == ["WATCHDOG=1"]


def test_a_reload_has_its_time(system: ServiceManager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    system.notifier().reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    first, moment, _ = system.told()
    assert first == "RELOADING=1"
    assert before <= int(moment.removeprefix("MONOTONIC_USEC=")) <= after


@pytest.mark.parametrize("name", ["/no/such/socket", "vsock:2:1", "/" + "x" * 200])
def test_a_socket_that_can_not_be_reached_is_logged_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name})

    notifier.ready("serving")
    notifier.alive()

    assert [r.getMessage().startswith("cannot tell systemd over") for r in caplog.records] == [True]


def test_without_systemd_nobody_is_told() -> None:
    notifier = Notifier({})

    notifier.ready("serving")

    assert notifier.watchdog_seconds is None


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_when_the_watchdog_bites(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier(environ).watchdog_seconds == seconds


@pytest.mark.anyio
async def test_the_watchdog_is_fed_only_while_the_manager_decides_things(
    system: ServiceManager, manager: AsyncModelManager, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = system.notifier(WATCHDOG_USEC="40000")
    feeding = asyncio.create_task(keep_watchdog(notifier, manager.check_alive))

    assert await asyncio.to_thread(system.told) == ["WATCHDOG=1"]
    assert await asyncio.to_thread(system.told) == ["WATCHDOG=1"]
    async with manager.lock:
        await until(lambda: "it is stuck" in caplog.text)
        system.socket.setblocking(False)
        while True:  # what was sent before the lock was taken
            try:
                system.told()
            except BlockingIOError:
                break
        with pytest.raises(BlockingIOError):
            system.told()
    system.socket.settimeout(10)
    assert await asyncio.to_thread(system.told) == ["WATCHDOG=1"]
    feeding.cancel()
    await asyncio.wait([feeding])


@pytest.mark.anyio
async def test_a_daemon_tells_of_its_life(
    system: ServiceManager, manager: AsyncModelManager
) -> None:
    config = DaemonConfig(server=ServerConfig(port=0), models=(trunk_config("other"),))
    daemon = Daemon(config, manager=manager, announce=lambda _: None, notifier=system.notifier())
    serving = asyncio.create_task(daemon.serve())

    async def told() -> list[str]:
        return await asyncio.to_thread(system.told)

    assert await told() == ["READY=1", f"STATUS=listening on {daemon.url}, loading models"]
    assert await told() == ["STATUS=ready (1 model)"]
    daemon.reload()
    assert (await told())[0] == "RELOADING=1"
    assert (await told())[0] == "READY=1"
    daemon.stop()
    assert await told() == ["STOPPING=1", "STATUS=draining"]
    assert await serving == 0


def unit() -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def test_the_unit_file_fits_the_daemon() -> None:
    service = unit()

    assert service["Type"] == "notify"
    assert service["ExecReload"].endswith("-HUP $MAINPID")
    assert int(service["TimeoutStopSec"]) > ServerConfig().drain_timeout
    assert re.search(r"splitlearn serve --config \S+ --log-format json$", service["ExecStart"])
