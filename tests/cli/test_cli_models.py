"""`splitlearn models` against a daemon on a real socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from serving_fakes import FakeLoader, fake_daemon
from typer.testing import Result

from splitlearn_manager.client.address import Address
from splitlearn_manager.client.management import DaemonEvent, ManagementClient
from splitlearn_manager.commands import models
from splitlearn_manager.core.events import TransitionEvent
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.server.daemon import Daemon

Run = Callable[..., Result]


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def start(loader: FakeLoader) -> Iterator[Callable[..., Daemon]]:
    """Yield a function that starts a daemon with `other` loaded, `late` and `broken` not."""
    with ExitStack() as stack:

        def begin(**server: Any) -> Daemon:
            values = {"management": True, **server}
            names = ("other", "late?", "broken?")
            return stack.enter_context(fake_daemon(loader, *names, **values))

        yield begin


@pytest.fixture
def daemon(start: Callable[..., Daemon]) -> Daemon:
    return start()


@pytest.fixture
def run(invoke: Run, daemon: Daemon) -> Run:
    """Return a function that runs a command against the daemon."""
    return lambda *arguments: invoke("models", *arguments, "--url", daemon.url)


def test_the_list_is_for_people_or_for_programs(run: Run) -> None:
    told, plain = run("list"), run("list", "--json")

    assert told.exit_code == 0
    heading, other, late, broken = told.stdout.splitlines()
    assert heading.split()[:4] == ["model", "state", "part", "layers"]
    assert other.split()[:5] == ["other", "ready", "other", "1-2", "cpu"]
    assert late.split()[:2] == ["late", "absent"]
    assert late.endswith("not loaded")
    assert broken.split()[0] == "broken"
    listed = json.loads(plain.stdout)["models"]
    assert [m["status"] for m in listed] == ["ready", "absent", "absent"]


def test_load_reload_unload(run: Run) -> None:
    assert run("load", "late").stdout == "late: ready\n"
    assert run("load", "late").stdout == "late: ready\n"
    assert run("reload", "late").stdout == "late: ready\n"
    assert run("reload", "late", "--policy", "unload_first").stdout == "late: ready\n"
    assert run("unload", "late", "--drain-timeout", "5").stdout.startswith("late: absent")
    assert run("unload", "late").stdout == "late: absent\n"


def test_answers_for_programs(run: Run) -> None:
    assert json.loads(run("load", "late", "--json").stdout)["status"] == "ready"
    assert json.loads(run("reload", "late", "--json").stdout)["generation"] == 3
    assert json.loads(run("unload", "late", "--json").stdout)["status"] == "absent"


def test_at_once_or_waiting_and_cancelled(run: Run, loader: FakeLoader, daemon: Daemon) -> None:
    def let_go(event: TransitionEvent) -> None:
        if event.new is ModelStatus.FAILED:
            loader.gate.set()

    assert daemon._manager is not None
    daemon._manager.on_transition.append(let_go)
    loader.gate.clear()
    assert run("load", "late", "--no-wait").stdout == "late: loading\n"
    busy = run("unload", "late")
    assert (busy.exit_code, "cancel that first" in busy.stderr) == (1, True)

    cancelled = run("cancel", "late")

    assert (cancelled.exit_code, cancelled.stdout) == (0, "late: failed\n")
    assert run("cancel", "late").exit_code == 2


def test_a_load_that_fails_says_why(run: Run) -> None:
    failed = run("load", "broken")

    assert failed.exit_code == 1
    assert "'broken' failed to load: ValueError: the weights are cut off" in failed.stderr
    assert failed.stderr.count("splitlearn:") == 1


def test_a_reload_that_fails_says_so(
    run: Run, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise ValueError("cut off")

    monkeypatch.setattr(loader, "load_from_config", cut_off)
    failed = run("reload", "other")

    assert (failed.exit_code, "cut off" in failed.stderr) == (1, True)
    assert run("list").stdout.splitlines()[1].split()[:2] == ["other", "ready"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("load", "nothing"), 2, "has no model 'nothing'"),
        (("watch", "nothing"), 2, "has no model 'nothing'"),
        (("unload", "other", "--drain-timeout", "-1"), 2, "must be 0 to 86400 seconds"),
        (("reload", "other", "--policy", "both"), 2, "load_first or unload_first"),
        (("load", ".."), 2, "splitlearn: "),
    ],
)
def test_wrong_usage_is_told_in_a_line(
    run: Run, arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = run(*arguments)

    assert (result.exit_code, said in result.stderr) == (code, True)
    assert "Traceback" not in result.stderr


def test_management_must_be_allowed(invoke: Run, start: Callable[..., Daemon]) -> None:
    result = invoke("models", "load", "late", "--url", start(management=False).url)

    assert (result.exit_code, "server.management" in result.stderr) == (2, True)


def test_the_token_is_sent(
    invoke: Run, start: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "s3cret")
    url = start(token_env="SECRET_OF_THE_TEST").url  # noqa: S106
    (tmp_path / "token").write_text("s3cret\n")
    (tmp_path / "token").chmod(0o600)

    assert invoke("models", "list", "--url", url).exit_code == 2
    assert (
        invoke("models", "list", "--url", url, "--token-env", "SECRET_OF_THE_TEST").exit_code == 0
    )
    given = invoke("models", "load", "late", "--url", url, "--token-file", tmp_path / "token")
    assert given.stdout == "late: ready\n"


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [("http://127.0.0.1:1", 1, "cannot reach"), ("ftp://here", 2, "is no address")],
)
def test_an_address_without_a_daemon(invoke: Run, url: str, code: int, said: str) -> None:
    result = invoke("models", "load", "late", "--url", url)

    assert (result.exit_code, said in result.output) == (code, True)


def test_a_token_that_is_not_there(command: Any) -> None:
    result = command("models", "list", "--token-env", "NOT_SET_ANYWHERE")

    assert result.returncode == 2
    assert "NOT_SET_ANYWHERE must hold one token" in result.stderr


def test_it_does_not_import_torch(daemon: Daemon) -> None:
    code = (
        "import sys; from splitlearn_manager.cli import app\n"
        f"app(['models', 'load', 'late', '--url', {daemon.url!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_bar_follows_a_load() -> None:
    events = [
        DaemonEvent("model", {"model_id": "late", "status": "absent"}),
        DaemonEvent("progress", {"phase": "reading", "bytes_done": 5, "bytes_total": 10}),
        DaemonEvent("transition", {"new": "unloading"}),
        DaemonEvent("transition", {"new": "ready"}),
    ]

    models._follow(None, "late", events)  # type: ignore[arg-type]


def test_a_stream_that_lost_the_end_is_made_good(daemon: Daemon) -> None:
    client = ManagementClient(Address.parse(daemon.url))

    models._follow(client, "other", [DaemonEvent("lost", {"count": 1, "at": 0.0})])


def test_a_stream_that_ends_too_early_is_told() -> None:
    with pytest.raises(ConnectionError, match="shut down while it loaded model 'late'"):
        models._follow(None, "late", [])  # type: ignore[arg-type]


def test_what_happens_is_printed_until_the_end(daemon: Daemon, loader: FakeLoader) -> None:
    del loader
    with subprocess.Popen(
        [sys.executable, "-m", "splitlearn_manager", "models", "watch", "--url", daemon.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as watching:
        try:
            assert watching.stdout is not None
            assert [watching.stdout.readline() for _ in range(3)] == [
                "other: ready\n",
                "late: absent\n",
                "broken: absent\n",
            ]
            ManagementClient(Address.parse(daemon.url)).finish("late", "load")
            assert watching.stdout.readline() == "late: absent -> loading (a load was asked for)\n"

            watching.send_signal(signal.SIGINT)
            rest, errors = watching.communicate(timeout=60)
        finally:
            watching.kill()

    assert "late: loading -> ready (loaded)" in rest or rest == ""
    assert (watching.returncode, errors) == (130, "")


def test_every_event_has_a_line() -> None:
    said = [
        models.describe(DaemonEvent(name, {"model_id": "m", **data}))
        for name, data in (
            ("progress", {"phase": "warming_up", "bytes_done": 0, "bytes_total": 1024}),
            ("progress", {"phase": "queued", "bytes_done": 0, "bytes_total": 0}),
            ("reload_failed", {"reason": "why"}),
            ("lost", {"count": 3, "at": 0.0}),
            ("lost", {"count": None, "at": 0.0}),
            ("newer", {}),
        )
    ]

    assert said == [
        "m: warming up, 0 bytes of 1.0 KiB",
        "m: queued",
        "m: stays as it was, a reload failed (why)",
        "(3 events were lost: this end read too slowly, or was away)",
        "(events were lost: this end read too slowly, or was away)",
        'newer: {"model_id": "m"}',
    ]
