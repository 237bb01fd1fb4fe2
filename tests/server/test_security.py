"""What is let in: judged by itself, and through a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitlearn_manager.config import ServerConfig
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.server.security import AccessPolicy, SecurityMiddleware, loopback_hosts


def scope(path: str = "/v2", kind: str = "http", **headers: str) -> dict[str, Any]:
    raw = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return {"type": kind, "path": path, "headers": raw}


def verdict(policy: AccessPolicy, **kwargs: Any) -> int | None:
    refusal = policy.judge(scope(**kwargs))
    return None if refusal is None else refusal.status


ANY = AccessPolicy()
LOOPBACK = AccessPolicy(hosts=loopback_hosts("127.0.0.1", 8000))
SECRET = AccessPolicy(token="secret")  # noqa: S106


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"]
)
def test_this_machine_has_these_names(host: str) -> None:
    assert verdict(LOOPBACK, host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "evil.example",
        "localhost",
        "localhost:80",
        "127.0.0.1",
        "127.0.0.1:8000.evil.example",
        "localhost:8000@evil.example",
        "127.0.0.2:8000",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/metrics"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(host: str, path: str) -> None:
    assert verdict(LOOPBACK, path=path, host=host) == 403


def test_one_host_is_named() -> None:
    twice = scope(host="localhost:8000")
    twice["headers"] *= 2

    assert LOOPBACK.judge(scope()) is not None
    assert LOOPBACK.judge(twice) is not None


def test_the_port_of_http_goes_without_saying() -> None:
    assert "localhost" in loopback_hosts("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("bound", "host"), [("127.0.0.5", "127.0.0.5:1"), ("::1", "[::1]:1"), ("[::1]", "[::1]:1")]
)
def test_the_bound_address_is_a_name_too(bound: str, host: str) -> None:
    assert host in loopback_hosts(bound, 1)


def test_beyond_loopback_any_host_will_do() -> None:
    assert verdict(ANY, host="evil.example") is None


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "", "http://[", "http://[x]"]
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_pages_of_other_origins_are_refused(origin: str, kind: str) -> None:
    assert verdict(LOOPBACK, kind=kind, host="localhost:8000", origin=origin) == 403


def test_a_page_of_the_server_itself_is_let_in() -> None:
    kwargs = {"host": "localhost:8000", "origin": "http://localhost:8000"}

    assert verdict(LOOPBACK, **kwargs) is None


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_token_is_let_in(scheme: str) -> None:
    assert verdict(SECRET, authorization=f"{scheme} secret") is None


@pytest.mark.parametrize(
    "given",
    [
        "",
        "secret",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer secret2",
        "Basic secret",
        "Bearer \xe9",
    ],
)
def test_anything_else_is_not(given: str) -> None:
    assert verdict(SECRET, authorization=given) == 401


def test_the_refusal_says_what_is_asked_for() -> None:
    refusal = SECRET.judge(scope())

    assert refusal is not None
    assert refusal.headers == {"WWW-Authenticate": "Bearer"}
    assert "secret" not in refusal.message


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_probes_need_no_token(path: str) -> None:
    assert verdict(SECRET, path=path) is None


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2",
        "/metrics",
        "/v2/health",
        "/v2/health/live/",
        "//v2/health/live",
        "/v2/health/live/../../models",
        "/v2/models/trunk",
        "/nothing",
    ],
)
def test_everything_else_does(path: str) -> None:
    assert verdict(SECRET, path=path) == 401
    assert verdict(SECRET, path=path, kind="websocket") == 401


def test_a_policy_never_shows_its_token() -> None:
    assert "secret" not in repr(SECRET)


def test_a_daemon_on_loopback_checks_the_host() -> None:
    policy = AccessPolicy.of(ServerConfig(host="127.0.0.1"), port=8123)

    assert verdict(policy, host="127.0.0.1:8123") is None
    assert verdict(policy, host="127.0.0.1:8000") == 403


def test_a_daemon_for_others_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0 needs a token"):
        AccessPolicy.of(ServerConfig(host="0.0.0.0"), port=1)  # noqa: S104

    token_file = tmp_path / "token"
    token_file.write_text("secret\n")
    token_file.chmod(0o600)
    policy = AccessPolicy.of(
        ServerConfig(host="0.0.0.0", token_file=str(token_file)),  # noqa: S104
        port=1,
    )
    assert policy == SECRET


def test_a_token_file_may_be_named_by_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "token").chmod(0o600)

    assert AccessPolicy.of(ServerConfig(host="0.0.0.0", token_file="~/token"), port=1) == SECRET  # noqa: S104, S106


@pytest.mark.anyio
async def test_a_websocket_is_closed_where_it_can_not_be_answered() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = SecurityMiddleware(lambda *_: None, SECRET)  # type: ignore[arg-type, return-value]
    await middleware(scope(kind="websocket"), receive, send)

    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.anyio
async def test_through_a_daemon(serve: Any, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("secret")
    token_file.chmod(0o600)
    served = await serve(token_file=str(token_file))

    live = await served.ask("/v2/health/live")
    refused = await served.ask("/v2")
    allowed = await served.ask("/v2", Authorization="Bearer secret")
    rebound = await served.ask("/v2/health/live", Host="evil.example")

    assert (live.status, refused.status, allowed.status, rebound.status) == (200, 401, 200, 403)
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.headers["X-Request-ID"]
    assert "error" in refused.json
    assert "server" not in allowed.headers
