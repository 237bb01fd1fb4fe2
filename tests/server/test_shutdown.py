"""The end of a daemon in a process of its own, whatever it is at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from serving_fakes import ask

from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.address import Address
from splitlearn_manager.client.errors import RemoteUnavailable
from splitlearn_manager.client.management import ManagementClient

CHILD = Path(__file__).parents[1] / "support" / "daemon_child.py"
SOON = 60.0
"""Seconds for what takes one or two; what it must not wait for takes ten minutes."""


class Child:
    """A daemon in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.url = self.until("splitlearn: listening on ").removeprefix("splitlearn: listening on ")
        self.client = ManagementClient(Address.parse(self.url))

    def until(self, start: str) -> str:
        """Return the next line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.rstrip("\n")
        raise AssertionError(f"the daemon ended before it said {start!r}")

    def await_trunk(self) -> None:
        """Wait until the Trunk is loaded; beside a load that hangs, the daemon is never ready."""
        while self.client.model("trunk")["status"] != "ready":
            pass

    def let_forward_go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def terminate(self) -> None:
        """Send SIGTERM, and wait until that is seen."""
        self.process.terminate()
        while ask(self.url, "/v2/health/ready").json != {
            "ready": False,
            "error": "the server is shutting down",
        }:
            pass

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def begin(*arguments: str) -> Child:
        children.append(Child(*arguments))
        return children[-1]

    yield begin
    for child in children:
        child.end()


def test_a_load_that_hangs_does_not_keep_the_process_alive(start: Callable[..., Child]) -> None:
    child = start("600", "hang")
    child.until("loading")

    child.process.terminate()

    assert child.process.wait(SOON) == 0


def test_who_waits_streams_and_keeps_connections_does_not_hold_the_end(
    start: Callable[..., Child],
) -> None:
    """There are ten minutes for steps in flight; nothing here is one."""
    child = start("600", "trunk", "late")
    child.until("loading")
    address = urlsplit(child.url).netloc
    with (
        closing(HTTPConnection(address)) as kept,
        ThreadPoolExecutor() as pool,
        child.client.events() as events,
    ):
        kept.request("GET", "/v2")
        kept.getresponse().read()
        assert next(events).name == "model"
        waiting = pool.submit(child.client.finish, "late", "load")
        while "splitlearn_requests_in_flight 2.0" not in _lines(child):
            pass

        child.process.terminate()

        assert child.process.wait(SOON) == 0
        with pytest.raises(RemoteUnavailable, match=r"shutting down|shut down during the load"):
            waiting.result(30)
        assert all(event.name != "message" for event in events)  # read to its end


def _lines(child: Child) -> list[str]:
    """Return the metrics; the request for them is not counted."""
    return ask(child.url, "/metrics").body.decode().splitlines()


def test_while_it_drains_probes_are_answered_and_nothing_begins(
    start: Callable[..., Child],
) -> None:
    child = start("600", "trunk")
    child.await_trunk()
    with RemoteTrunk(child.url, "trunk") as trunk, ThreadPoolExecutor() as pool:
        step = pool.submit(trunk, torch.ones(1, 1, 4))
        child.until("forward")
        unload = pool.submit(child.client.finish, "trunk", "unload")
        while child.client.model("trunk")["status"] != "unloading":
            pass

        child.terminate()

        assert ask(child.url, "/v2/health/live").status == 200
        for path in ("/v2/repository/models/trunk/load", "/v2/repository/models/trunk/unload"):
            answer = ask(child.url, path, "POST")
            assert (answer.status, answer.json) == (503, {"error": "the server is shutting down"})
        assert ask(child.url, "/v2/events").status == 503
        with pytest.raises(RemoteUnavailable, match="shutting down"):
            unload.result(30)
        child.let_forward_go_on()
        assert torch.equal(step.result(30), torch.full((1, 1, 4), 2.0))
        assert child.process.wait(SOON) == 0


def test_a_second_signal_ends_a_load_that_hangs_at_once(start: Callable[..., Child]) -> None:
    child = start("600", "trunk", "hang")
    child.until("loading")
    child.await_trunk()
    with RemoteTrunk(child.url, "trunk", retry=None) as trunk, ThreadPoolExecutor() as pool:
        step = pool.submit(trunk, torch.ones(1, 1, 4))
        child.until("forward")
        child.terminate()

        child.process.send_signal(signal.SIGINT)

        assert child.process.wait(SOON) == -signal.SIGINT
        with pytest.raises(ConnectionError):
            step.result(30)


DAEMON = """\
server: {{port: 0, management: true}}
models:
  - model_id: trunk
    model_path: builtin:demo
    config: {{component: trunk, split_points: [2, 6]}}
{more}
"""
BOTTOM = """\
  - model_id: bottom
    model_path: builtin:demo
    config: {component: bottom, split_points: [2, 6]}
"""


def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    """The whole of it: the command line, its options over the file, and a real model."""
    file = tmp_path / "daemon.yaml"
    file.write_text(DAEMON.format(more=""))
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "splitlearn_manager", "serve", "--config", str(file)),
                *("--log-format", "json"),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rstrip("\n").removeprefix("splitlearn: listening on ")
        assert process.stdout.readline() == "splitlearn: ready (1 model)\n"
        client = ManagementClient(Address.parse(url))
        with client.events() as events:
            file.write_text(DAEMON.format(more=BOTTOM))
            process.send_signal(signal.SIGHUP)
            loaded = {"model_id": "bottom", "old": "loading", "new": "ready"}
            assert any(loaded.items() <= event.data.items() for event in events)

        file.write_text(DAEMON.format(more=BOTTOM).replace("model_path", "modle_path"))
        process.send_signal(signal.SIGHUP)
        said = f"the configuration stays as it was: {file}:4: models[0].modle_path: unknown key"
        while said not in log.read_text():
            assert process.poll() is None
        assert {m["model_id"]: m["status"] for m in client.models()} == {
            "trunk": "ready",
            "bottom": "ready",
        }
        process.terminate()
        assert process.wait(SOON) == 0
    finally:
        process.kill()
        process.communicate()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    moves = [(e["model_id"], e["new"]) for e in lines if e.get("event") == "model_transition"]
    assert moves[:4] == [
        ("trunk", "loading"),
        ("trunk", "ready"),
        ("bottom", "loading"),
        ("bottom", "ready"),
    ]
