"""`splitlearn models watch`, while connections are cut and daemons are started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from cut_wire import Wire
from serving_fakes import FakeLoader, fake_daemon
from typer.testing import Result

from splitlearn_manager.client.address import Address
from splitlearn_manager.client.errors import RemoteError, RemoteUnavailable
from splitlearn_manager.client.management import DaemonEvent, ManagementClient
from splitlearn_manager.client.watching import Watch
from splitlearn_manager.commands import models
from splitlearn_manager.server.daemon import Daemon

STATES = [("model", "other"), ("model", "late")]


@contextmanager
def daemon_with(*names: str) -> Iterator[Daemon]:
    with fake_daemon(FakeLoader(), *names, management=True) as daemon:
        yield daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with daemon_with("other", "late?") as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    wire = Wire(daemon.url)
    yield wire
    wire.close()


class Watcher:
    """Watches through a wire, by a clock of its own.

    Attributes:
        told: What it was told.
        waits: How long it has waited, each time.
        now: Its clock.
        meanwhile: What happens while it waits.
    """

    def __init__(self, url: str, model_id: str | None = None, away: float = 300.0) -> None:
        self.told: list[str] = []
        self.waits: list[float] = []
        self.now = 1000.0
        self.meanwhile: Callable[[], object] = lambda: None
        self.watch = Watch(
            client_of(url),
            model_id,
            away=away,
            tell=self.told.append,
            wait=self._wait,
            clock=lambda: self.now,
        )
        self.events = self.watch.events()

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.meanwhile()

    def states(self, count: int = 2) -> list[tuple[str, str]]:
        return [(e.name, e.data.get("model_id", "")) for e in self.take(count)]

    def take(self, count: int) -> list[DaemonEvent]:
        return [next(self.events) for _ in range(count)]

    def until(self, new: str) -> list[DaemonEvent]:
        """Return the events up to a model's next move to a state."""
        events = self.take(1)
        while events[-1].data.get("new") != new:
            events += self.take(1)
        return events


def client_of(url: str) -> ManagementClient:
    return ManagementClient(Address.parse(url))


def test_what_happened_while_the_connection_was_lost_is_all_told(
    daemon: Daemon, wire: Wire
) -> None:
    watcher = Watcher(wire.url)
    assert watcher.states() == STATES
    client_of(daemon.url).finish("late", "load")
    watcher.until("ready")

    wire.cut()
    client_of(daemon.url).finish("late", "unload")
    moves = [(event.name, event.data["new"]) for event in watcher.until("absent")]

    assert moves == [("transition", "unloading"), ("transition", "absent")]
    assert (len(watcher.waits), wire.connections) == (1, 2)
    lost, again = watcher.told
    assert lost.startswith(f"cannot reach {wire.url}: ")
    assert lost.endswith("; trying again for 300 s")
    assert again == f"connected to {wire.url} again"


def test_a_daemon_that_was_started_anew_gives_its_states(wire: Wire, daemon: Daemon) -> None:
    watcher = Watcher(wire.url)
    assert watcher.states() == STATES
    wire.lead_to(None)
    daemon.stop()
    with daemon_with("newer") as newer:

        def came_up() -> None:
            if len(watcher.waits) == 4:
                wire.lead_to(newer.url)

        watcher.meanwhile = came_up
        lost, state = watcher.take(2)
        client_of(newer.url).finish("newer", "reload")
        moves = [event.data.get("new") for event in watcher.until("ready")]
        watcher.events.close()

    assert (lost.name, lost.data["count"]) == ("lost", None)
    assert (state.name, state.data["model_id"]) == ("model", "newer")
    assert "ready" in moves
    assert watcher.told == [
        f"{wire.url} ended its events; trying again for 300 s",
        f"connected to {wire.url} again",
    ]


def test_a_daemon_that_stays_away_is_given_up(wire: Wire) -> None:
    watcher = Watcher(wire.url, away=60)
    watcher.states()
    wire.lead_to(None)
    wire.cut()

    with pytest.raises(RemoteUnavailable, match=rf"cannot reach {wire.url}: .*; given up after 60"):
        next(watcher.events)

    assert sum(watcher.waits) == pytest.approx(60)
    assert (max(watcher.waits) <= 15, len(watcher.waits) < 20) == (True, True)
    assert len(watcher.told) == 1


def test_waits_grow_until_a_connection_has_lasted(
    daemon: Daemon, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda _, high: high)
    watcher = Watcher(wire.url)
    watcher.states()

    def cut() -> None:
        wire.cut()
        client_of(daemon.url).finish("other", "reload")
        watcher.until("ready")

    for _ in range(3):
        cut()
    assert watcher.waits == [0.5, 1.0, 2.0]

    watcher.now += 60
    cut()
    assert watcher.waits[3:] == [0.5]


def test_what_a_daemon_refuses_when_it_is_back_ends_it(wire: Wire) -> None:
    watcher = Watcher(wire.url, "late")
    assert watcher.states(1) == [("model", "late")]
    with daemon_with("newer") as newer:
        wire.lead_to(newer.url)
        wire.cut()

        with pytest.raises(RemoteError, match="has no model 'late'"):
            next(watcher.events)


def test_with_no_patience_the_end_of_the_stream_is_the_end(daemon: Daemon, wire: Wire) -> None:
    cut, ended = Watcher(wire.url, away=0), Watcher(daemon.url, away=0)
    cut.states()
    ended.states()

    wire.cut()
    with pytest.raises(RemoteUnavailable, match="cannot reach"):
        next(cut.events)
    daemon.stop()

    assert list(ended.events) == []
    assert cut.told + ended.told == []


@pytest.mark.parametrize("away", [-1.0, float("nan")])
def test_how_long_it_may_stay_away_is_a_number(away: float, daemon: Daemon) -> None:
    with pytest.raises(ValueError, match="0 seconds or more, found"):
        Watcher(daemon.url, away=away)


def test_what_answers_with_a_page_is_no_daemon() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<p>hello\n\n")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()
        watcher = Watcher(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(RemoteError, match="/v2/events is no stream of events"):
            next(watcher.events)
        serving.join()


def test_the_command_goes_on_until_it_is_interrupted(daemon: Daemon, wire: Wire) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "splitlearn_manager", "models", "watch", "--url", wire.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        try:
            said = [watching.stdout.readline() for _ in range(2)]
            wire.cut()
            told = [watching.stderr.readline() for _ in range(2)]
            client_of(daemon.url).finish("late", "load")
            said.append(watching.stdout.readline())
            wire.lead_to(None)
            daemon.stop()
            told.append(watching.stderr.readline())  # and now it waits

            watching.send_signal(signal.SIGINT)
            assert watching.wait(60) == 130
            rest = watching.stderr.read()
        finally:
            watching.kill()

    assert said == [
        "other: ready\n",
        "late: absent\n",
        "late: absent -> loading (a load was asked for)\n",
    ]
    assert told[0].startswith(f"splitlearn: cannot reach {wire.url}: ")
    assert told[1:] == [
        f"splitlearn: connected to {wire.url} again\n",
        f"splitlearn: {wire.url} ended its events; trying again for 300 s\n",
    ]
    assert rest == ""


def test_the_command_says_that_it_gives_up(
    invoke: Callable[..., Result], wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(event: DaemonEvent) -> str:
        if event.data["model_id"] == "late":  # the last there is
            wire.lead_to(None)
            wire.cut()
        return "an event"

    monkeypatch.setattr(models, "describe", noted)
    result = invoke("models", "watch", "--url", wire.url, "--reconnect-timeout", 0.1)

    assert (result.exit_code, result.stdout) == (1, "an event\nan event\n")
    lost, given_up = result.stderr.splitlines()
    assert lost.endswith("; trying again for 0.1 s")
    assert given_up.startswith(f"splitlearn: cannot reach {wire.url}: ")
    assert given_up.endswith("; given up after 0.1 s")


def test_a_time_that_is_none_is_wrong_usage(invoke: Callable[..., Result]) -> None:
    result = invoke("models", "watch", "--reconnect-timeout", -1)

    assert (result.exit_code, "may stay away for 0 seconds" in result.output) == (2, True)
