"""`RemoteTrunk` and a real daemon, whose Trunk is a fake that can be held, failed and watched.

Most of it without going on where something was lost; for that see `test_healing.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from serving_fakes import FakeLoader, FakePart, fake_daemon

from splitlearn_core.errors import CacheMismatchError
from splitlearn_manager.client import (
    RemoteError,
    RemoteSessionClosed,
    RemoteTrunk,
    RemoteUnavailable,
    connection,
)
from splitlearn_manager.client.websocket import WebSocket
from splitlearn_manager.server import daemon as daemon_module
from splitlearn_manager.server import http_server
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.server.http_server import SessionProtocol
from splitlearn_manager.serving.sessions import SessionTable


@pytest.fixture(scope="module")
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture(scope="module")
def daemon(loader: FakeLoader) -> Iterator[Daemon]:
    with fake_daemon(loader, "trunk", "top", session_resume_timeout=0) as daemon:
        yield daemon


@pytest.fixture
def part(daemon: Daemon, loader: FakeLoader) -> Iterator[FakePart]:
    """Return the Trunk on the server, as new."""
    del daemon
    part = loader.parts["trunk"]
    part.calls.clear()
    yield part
    part.fail_with = None
    part.gate.set()


@pytest.fixture
def trunk(daemon: Daemon, part: FakePart) -> Iterator[RemoteTrunk]:
    del part
    with RemoteTrunk(daemon.url, "trunk", timeout=30, retry=None) as trunk:
        yield trunk


def sessions_open(daemon: Daemon) -> float | None:
    return daemon.metrics.registry.get_sample_value("splitlearn_sessions_open", {"model": "trunk"})


def until(condition: Callable[[], bool]) -> None:
    """Wait for the other side of a socket, which has no event that a test could wait for."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def attendants() -> set[threading.Thread]:
    """Return the threads that tend connections; those of tests before this may just be ending."""
    return {t for t in threading.enumerate() if t.name == "splitlearn-remote-attendant"}


def ones(batch: int = 1, new: int = 1) -> torch.Tensor:
    return torch.ones(batch, new, 4)


# --- What it is ------------------------------------------------------------------------------


def test_it_says_what_it_is(trunk: RemoteTrunk) -> None:
    assert trunk.component == "trunk"
    assert (trunk.start_layer, trunk.end_layer, trunk.num_layers) == (1, 3, 5)
    assert trunk.hidden_size == 4
    assert trunk.dtype is torch.float32
    assert (trunk.num_parameters(), trunk.nbytes) == (20, 80)


def test_its_repr_has_no_token(daemon: Daemon) -> None:
    trunk = RemoteTrunk(daemon.url, "trunk", token="secret")  # noqa: S106

    assert repr(trunk) == f"RemoteTrunk('{daemon.url}', 'trunk')"
    assert "secret" not in repr(vars(trunk))


def test_making_one_does_not_connect() -> None:
    RemoteTrunk("http://127.0.0.1:1", "trunk")


def test_an_unknown_model_lists_what_there_is(daemon: Daemon) -> None:
    with pytest.raises(RemoteError, match="no model 'nothing'; there are: trunk, top") as caught:
        _ = RemoteTrunk(daemon.url, "nothing").start_layer

    assert caught.value.code == "model_not_found"


def test_another_part_is_refused(daemon: Daemon) -> None:
    with pytest.raises(RemoteError, match="is 'top', and a Trunk is needed") as caught:
        RemoteTrunk(daemon.url, "top")(ones())

    assert caught.value.code == "unsupported_component"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_a_server_that_is_not_there_is_named_with_the_reason() -> None:
    address = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(RemoteUnavailable, match=f"cannot reach {address}: Connection refused"):
        _ = RemoteTrunk(address, "trunk").start_layer


def test_packed_sequences_are_refused_where_they_would_be_told_apart(trunk: RemoteTrunk) -> None:
    packed = torch.tensor([[0, 1, 0, 1]])

    with pytest.raises(ValueError, match="a row of its own"):
        trunk(ones(1, 4), position_ids=packed, use_cache=False)

    trunk(ones(1, 4), position_ids=packed)
    trunk(ones(1, 4), position_ids=packed, attention_mask=torch.ones(1, 4), use_cache=False)
    trunk(ones(1, 4), position_ids=torch.tensor([[3, 4, 5, 6]]), use_cache=False)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ws://host:8000",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "http://a..b",
        "http://user@host",
        "http://host?a=1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is no address|must have nothing but"):
        RemoteTrunk(url, "trunk")


class OtherServer(BaseHTTPRequestHandler):
    """A server of something else; its path says how it answers."""

    def do_GET(self) -> None:
        if "redirect" in self.path:
            self.send_response(302)
            self.send_header("Location", "http://elsewhere.example/")
            self.end_headers()
            return
        self.send_response(404 if "missing" in self.path else 200)
        self.end_headers()
        self.wfile.write(b'{"name": "x"}' if "json" in self.path else b"<html>")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("html", "did not answer with JSON"),
        ("json", "is no SplitLearn daemon"),
        ("missing", "answered 404: no error of a SplitLearn daemon"),
        ("redirect", "answered 302"),
    ],
)
def test_another_server_is_noticed(prefix: str, said: str) -> None:
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(RemoteError, match=said):
                _ = RemoteTrunk(f"http://127.0.0.1:{server.server_port}/{prefix}", "t").dtype
        finally:
            server.shutdown()
            thread.join()


# --- Steps -----------------------------------------------------------------------------------


def test_a_step_without_a_cache_has_a_session_of_its_own(
    trunk: RemoteTrunk, daemon: Daemon
) -> None:
    assert torch.equal(trunk(ones(2, 3)), torch.full((2, 3, 4), 2.0))

    assert sessions_open(daemon) == 0


def test_steps_with_a_cache_continue(trunk: RemoteTrunk, part: FakePart) -> None:
    cache = trunk.new_cache()
    assert cache.get_seq_length() == 0

    trunk(ones(1, 3), past_key_values=cache)
    trunk(ones(1, 1), past_key_values=cache)

    assert cache.get_seq_length() == 4
    assert part.calls[0]["past_key_values"] is part.calls[1]["past_key_values"]


def test_a_mask_of_ones_is_not_sent(trunk: RemoteTrunk, part: FakePart) -> None:
    cache = trunk.new_cache()
    for start, new in ((0, 3), (3, 1)):
        trunk(
            ones(2, new),
            past_key_values=cache,
            attention_mask=torch.ones(2, start + new, dtype=torch.int64),
            position_ids=torch.arange(start, start + new).expand(2, new),
        )

    assert [call["attention_mask"] for call in part.calls] == [None, None]
    assert [call["position_ids"].tolist() for call in part.calls] == [[[0, 1, 2]] * 2, [[3]] * 2]


def test_a_padded_batch_arrives_whole(trunk: RemoteTrunk, part: FakePart) -> None:
    cache = trunk.new_cache()
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    ids = torch.tensor([[1, 1, 0], [0, 1, 2]])
    trunk(ones(2, 3), past_key_values=cache, attention_mask=mask, position_ids=ids)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    trunk(
        ones(2, 1),
        past_key_values=cache,
        attention_mask=longer,
        position_ids=torch.tensor([[1], [3]]),
    )

    assert torch.equal(part.calls[0]["attention_mask"], mask)
    assert torch.equal(part.calls[0]["position_ids"], ids)
    assert torch.equal(part.calls[1]["attention_mask"], longer)
    assert part.calls[1]["position_ids"].tolist() == [[1], [3]]


def test_a_mask_that_begins_late_arrives_whole(trunk: RemoteTrunk, part: FakePart) -> None:
    cache = trunk.new_cache()
    trunk(ones(1, 2), past_key_values=cache)
    mask = torch.tensor([[1, 1, 0]])

    trunk(ones(1, 1), past_key_values=cache, attention_mask=mask)

    assert torch.equal(part.calls[1]["attention_mask"], mask)


@pytest.mark.parametrize("later", [None, torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 1]])])
def test_a_mask_can_not_change_what_was_sent(
    trunk: RemoteTrunk, later: torch.Tensor | None
) -> None:
    cache = trunk.new_cache()
    trunk(ones(1, 2), past_key_values=cache, attention_mask=torch.tensor([[0, 1]]))

    with pytest.raises(ValueError, match="changes positions that are in the cache"):
        trunk(ones(1, 1), past_key_values=cache, attention_mask=later)

    assert cache.get_seq_length() == 2


def test_position_ids_of_one_row_are_for_all(trunk: RemoteTrunk, part: FakePart) -> None:
    trunk(ones(2, 2), position_ids=torch.tensor([[3, 5]]))

    assert part.calls[0]["position_ids"].tolist() == [[3, 5], [3, 5]]


@pytest.mark.parametrize(
    ("hidden", "kwargs", "said"),
    [
        (torch.ones(1, 1, 5), {}, r"must be \[batch, new, 4\], found \[1, 1, 5\]"),
        (torch.ones(1, 4), {}, r"found \[1, 4\]"),
        (torch.ones(1, 0, 4), {}, r"found \[1, 0, 4\]"),
        (ones().half(), {}, r"are torch.float16, and 'trunk' at .* computes in torch.float32"),
        (
            ones(1, 2),
            {"attention_mask": torch.ones(1, 3)},
            r"attention_mask must be .* \[1, 2\], found \[1, 3\]",
        ),
        (
            ones(1, 2),
            {"position_ids": torch.ones(2, 2)},
            r"position_ids must be .* \[1, 2\], found \[2, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_it_travels(
    trunk: RemoteTrunk, part: FakePart, hidden: torch.Tensor, kwargs: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        trunk(hidden, **kwargs)

    assert part.calls == []
    assert trunk.bytes_sent == 0


def test_the_number_of_rows_is_fixed(trunk: RemoteTrunk) -> None:
    cache = trunk.new_cache()
    trunk(ones(2), past_key_values=cache)

    with pytest.raises(ValueError, match="the cache has 2 rows, found 3"):
        trunk(ones(3), past_key_values=cache)


def test_a_cache_of_another_part_is_refused(trunk: RemoteTrunk, daemon: Daemon) -> None:
    other = RemoteTrunk(daemon.url, "trunk")

    with pytest.raises(CacheMismatchError, match="found RemoteCache"):
        trunk(ones(), past_key_values=other.new_cache())
    with pytest.raises(CacheMismatchError, match="found dict"):
        trunk(ones(), past_key_values={})  # type: ignore[arg-type]
    with pytest.raises(CacheMismatchError, match="use_cache=True needs"):
        trunk(ones(), use_cache=True)


def test_a_step_that_the_server_refuses_leaves_the_cache_as_it_was(trunk: RemoteTrunk) -> None:
    cache = trunk.new_cache()
    trunk(ones(1, 15), past_key_values=cache)

    with pytest.raises(RemoteError, match="position 17, the session has 16") as caught:
        trunk(ones(1, 2), past_key_values=cache)

    assert caught.value.code == "too_long"
    assert cache.get_seq_length() == 15
    trunk(ones(1, 1), past_key_values=cache)


def test_bytes_are_counted(trunk: RemoteTrunk) -> None:
    cache = trunk.new_cache()
    trunk(ones(), past_key_values=cache)
    sent, received = trunk.bytes_sent, trunk.bytes_received

    trunk(ones(), past_key_values=cache)

    step = 16 + 4 + 3 * 4 + 4 * 4  # header, descriptor, dimensions, data
    assert (trunk.bytes_sent - sent, trunk.bytes_received - received) == (step, step)


def test_a_token_takes_few_bytes_beside_its_hidden_states(trunk: RemoteTrunk) -> None:
    """With all that `generate` gives, in a padded batch: at most 128 for both ways together."""
    cache = trunk.new_cache()
    mask = torch.tensor([[0, 1], [1, 1]])
    trunk(ones(2, 2), past_key_values=cache, attention_mask=mask, position_ids=mask.cumsum(1))
    before = trunk.bytes_sent + trunk.bytes_received

    longer = torch.cat([mask, mask[:, 1:]], dim=1)
    trunk(ones(2), past_key_values=cache, attention_mask=longer, position_ids=mask[:, 1:] * 2)

    moved = trunk.bytes_sent + trunk.bytes_received - before
    assert moved <= 2 * ones(2).nbytes + 128


# --- Gradients -------------------------------------------------------------------------------


def test_gradients_do_not_cross(trunk: RemoteTrunk) -> None:
    hidden = ones().requires_grad_()

    output = trunk(hidden)

    assert torch.equal(output.detach(), torch.full((1, 1, 4), 2.0))
    with pytest.raises(RuntimeError, match="gradients do not cross a RemoteTrunk"):
        output.sum().backward()


def test_without_gradients_the_answer_is_a_plain_tensor(trunk: RemoteTrunk) -> None:
    with torch.no_grad():
        assert not trunk(ones().requires_grad_()).requires_grad
    assert trunk(ones()).grad_fn is None


# --- The end of a session --------------------------------------------------------------------


def test_a_closed_cache_is_gone_there_and_here(trunk: RemoteTrunk, daemon: Daemon) -> None:
    cache = trunk.new_cache()
    trunk(ones(), past_key_values=cache)

    cache.close()

    assert sessions_open(daemon) == 0
    with pytest.raises(RemoteSessionClosed, match="has ended") as caught:
        trunk(ones(), past_key_values=cache)
    assert caught.value.reason == "closed"


def test_a_cache_that_was_reset_begins_again(trunk: RemoteTrunk, daemon: Daemon) -> None:
    cache = trunk.new_cache()
    trunk(ones(2), past_key_values=cache, attention_mask=torch.tensor([[0], [1]]))

    cache.reset()

    assert (cache.get_seq_length(), sessions_open(daemon)) == (0, 0)
    trunk(ones(1, 3), past_key_values=cache)
    assert (cache.get_seq_length(), sessions_open(daemon)) == (3, 1)


def test_a_cache_that_nobody_has_any_more_is_closed(trunk: RemoteTrunk, daemon: Daemon) -> None:
    cache = trunk.new_cache()
    trunk(ones(), past_key_values=cache)

    del cache
    gc.collect()

    until(lambda: sessions_open(daemon) == 0)


def test_what_was_left_is_closed_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server has room for one session, the thread that closes them may come too late."""
    monkeypatch.setattr(connection, "_attend", lambda *_: None)
    with fake_daemon(FakeLoader(), max_sessions=1) as daemon:
        trunk = RemoteTrunk(daemon.url, "trunk")
        for _ in range(3):
            cache = trunk.new_cache()
            trunk(ones(), past_key_values=cache)
            del cache
            gc.collect()
        trunk._connection.close()


def test_a_trunk_that_nobody_has_any_more_lets_go_of_its_threads(daemon: Daemon) -> None:
    before = attendants()
    trunk = RemoteTrunk(daemon.url, "trunk")
    trunk(ones())
    (own,) = attendants() - before

    del trunk
    gc.collect()

    until(lambda: not own.is_alive())


def test_closing_ends_sessions_and_threads(daemon: Daemon) -> None:
    before = attendants()
    trunk = RemoteTrunk(daemon.url, "trunk")
    cache = trunk.new_cache()
    trunk(ones(), past_key_values=cache)
    (own,) = attendants() - before

    trunk.close()
    trunk.close()

    until(lambda: sessions_open(daemon) == 0 and not own.is_alive())
    with pytest.raises(RemoteSessionClosed):
        trunk(ones(), past_key_values=cache)
    with pytest.raises(RuntimeError, match="was closed"):
        trunk(ones())


def test_closing_while_a_session_is_being_opened_leaves_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = RemoteTrunk(daemon.url, "trunk")
    trunk(ones())
    open_session = trunk._connection.open_session

    def close_first(**wishes: bool) -> connection.RemoteSession:
        trunk.close()
        return open_session(**wishes)

    monkeypatch.setattr(trunk._connection, "open_session", close_first)

    with pytest.raises(RuntimeError, match="was closed"):
        trunk(ones())
    assert trunk._connection._socket is None
    until(lambda: sessions_open(daemon) == 0)


def test_a_step_that_failed_there_ends_the_cache(trunk: RemoteTrunk, part: FakePart) -> None:
    cache = trunk.new_cache()
    part.fail_with = RuntimeError("secret detail")
    with pytest.raises(RemoteError, match="the step failed on the server") as caught:
        trunk(ones(), past_key_values=cache)
    part.fail_with = None

    assert caught.value.code == "internal"
    with pytest.raises(RemoteSessionClosed) as ended:
        trunk(ones(), past_key_values=cache)
    assert ended.value.reason == "internal"
    trunk(ones())


def test_sessions_that_expired_meanwhile_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    table = partial(SessionTable, clock=lambda: now, sleep=lambda _: asyncio.sleep(0.001))
    monkeypatch.setattr(daemon_module, "SessionTable", table)

    def later_there_is_none() -> bool:
        nonlocal now
        now += 100  # each time: the step's end counts as a use, and comes after its answer
        return sessions_open(daemon) == 0

    with fake_daemon(FakeLoader(), session_idle_timeout=100) as daemon:
        with RemoteTrunk(daemon.url, "trunk", retry=None) as trunk:
            cache = trunk.new_cache()
            trunk(ones(), past_key_values=cache)
            until(later_there_is_none)

            with pytest.raises(RemoteSessionClosed) as caught:
                trunk(ones(), past_key_values=cache)

        assert caught.value.reason == "expired"


def test_a_server_without_room_is_unavailable() -> None:
    with (
        fake_daemon(FakeLoader(), max_sessions=1) as daemon,
        RemoteTrunk(daemon.url, "trunk", retry=None) as trunk,
    ):
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)

        with pytest.raises(RemoteUnavailable, match="as many as it may"):
            trunk(ones())

        cache.close()
        trunk(ones())


def test_a_step_longer_than_the_server_reads_is_not_sent() -> None:
    with (
        fake_daemon(FakeLoader(), max_frame_bytes=1024) as daemon,
        RemoteTrunk(daemon.url, "trunk") as trunk,
    ):
        with pytest.raises(ValueError, match="takes 1056 bytes, and the server reads 1024"):
            trunk(ones(64, 1))
        trunk(ones(62, 1))


def test_a_step_that_takes_too_long_gives_up_its_session(daemon: Daemon, part: FakePart) -> None:
    with RemoteTrunk(daemon.url, "trunk", retry=None) as trunk:
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        trunk._connection.timeout = 0.05
        part.gate.clear()
        with pytest.raises(RemoteUnavailable, match=r"did not answer within 0\.05 s"):
            trunk(ones(), past_key_values=cache)
        part.gate.set()
        until(lambda: sessions_open(daemon) == 0)

        with pytest.raises(RemoteSessionClosed) as caught:
            trunk(ones(), past_key_values=cache)
        assert caught.value.reason == "interrupted"


def test_a_late_answer_is_not_taken_for_another(daemon: Daemon, part: FakePart) -> None:
    with RemoteTrunk(daemon.url, "trunk", retry=None) as trunk:
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        trunk._connection.timeout = 0.05
        part.gate.clear()
        with pytest.raises(RemoteUnavailable):
            trunk(ones(), past_key_values=cache)
        part.gate.set()
        until(lambda: sessions_open(daemon) == 0)
        trunk._connection.timeout = 30

        assert torch.equal(trunk(ones() * 5), torch.full((1, 1, 4), 10.0))


def test_draining_answers_the_step_in_flight_and_ends_the_cache(caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    loader = FakeLoader()
    with fake_daemon(loader) as daemon, ThreadPoolExecutor() as pool:
        part = loader.parts["trunk"]
        with RemoteTrunk(daemon.url, "trunk", retry=None) as trunk:
            idle, busy = trunk.new_cache(), trunk.new_cache()
            trunk(ones(), past_key_values=idle)
            part.entered.acquire()
            part.gate.clear()
            step = pool.submit(trunk, ones(), past_key_values=busy)
            assert part.entered.acquire(timeout=30)

            daemon.stop()
            until(lambda: sessions_open(daemon) == 1)
            part.gate.set()

            assert torch.equal(step.result(30), torch.full((1, 1, 4), 2.0))
            with pytest.raises(RemoteSessionClosed) as caught:
                trunk(ones(), past_key_values=idle)
            assert caught.value.reason == "draining"


def test_a_lost_connection_ends_caches_and_is_made_again(
    trunk: RemoteTrunk, daemon: Daemon
) -> None:
    cache = trunk.new_cache()
    trunk(ones(), past_key_values=cache)
    assert trunk._connection._socket is not None
    trunk._connection._socket._socket.shutdown(socket.SHUT_RDWR)

    with pytest.raises(RemoteSessionClosed) as caught:
        trunk(ones(), past_key_values=cache)

    assert caught.value.reason == "connection_lost"
    assert torch.equal(trunk(ones()), torch.full((1, 1, 4), 2.0))
    until(lambda: sessions_open(daemon) == 0)


def test_an_idle_connection_answers_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon gives up a client that does not, and its sessions with it."""
    monkeypatch.setattr(http_server, "PING_INTERVAL", 0.02)
    monkeypatch.setattr(connection, "TEND_INTERVAL", 0.01)
    answered = threading.Semaphore(0)
    handle_pong = SessionProtocol.handle_pong

    def count(protocol: SessionProtocol, event: Any) -> None:
        handle_pong(protocol, event)
        answered.release()

    monkeypatch.setattr(SessionProtocol, "handle_pong", count)
    with fake_daemon(FakeLoader()) as daemon, RemoteTrunk(daemon.url, "trunk") as trunk:
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        for _ in range(3):
            assert answered.acquire(timeout=30)

        trunk(ones(), past_key_values=cache)


def test_interrupting_a_step_drops_the_connection(
    trunk: RemoteTrunk, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much of a frame went through is not known."""
    cache = trunk.new_cache()
    trunk(ones(), past_key_values=cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WebSocket, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trunk(ones(), past_key_values=cache)

    until(lambda: sessions_open(daemon) == 0)
    with pytest.raises(RemoteSessionClosed) as caught:
        trunk(ones(), past_key_values=cache)
    assert caught.value.reason == "interrupted"
    trunk(ones())


def test_a_server_that_ended_is_unavailable() -> None:
    with fake_daemon(FakeLoader()) as daemon, RemoteTrunk(daemon.url, "trunk", retry=None) as trunk:
        cache = trunk.new_cache()
        trunk(ones(), past_key_values=cache)
        daemon.stop()
        until(lambda: daemon._loop is not None and daemon._loop.is_closed())

        with pytest.raises(RemoteSessionClosed):
            trunk(ones(), past_key_values=cache)
        with pytest.raises(RemoteUnavailable, match="cannot reach"):
            trunk(ones())


def test_threads_take_turns(trunk: RemoteTrunk) -> None:
    def use(number: int) -> bool:
        cache = trunk.new_cache()
        outputs = [trunk(ones() * number, past_key_values=cache) for _ in range(16)]
        return all(torch.equal(output, ones() * number * 2) for output in outputs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(1, 17)))


def test_a_token_is_sent_where_it_is_asked_for(tmp_path: Any) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("right")
    token_file.chmod(0o600)
    with fake_daemon(FakeLoader(), token_file=str(token_file)) as daemon:
        with RemoteTrunk(daemon.url, "trunk", token="right") as trunk:  # noqa: S106
            trunk(ones())
        with pytest.raises(RemoteError, match="a bearer token is needed") as caught:
            _ = RemoteTrunk(daemon.url, "trunk", token="wrong").dtype  # noqa: S106

    assert caught.value.code == "unauthorized"


def test_proxies_of_the_environment_are_not_asked(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "ws_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    with RemoteTrunk(daemon.url, "trunk") as trunk:
        trunk(ones())


def test_it_works_beside_a_running_event_loop(trunk: RemoteTrunk) -> None:
    async def use() -> torch.Tensor:
        return await asyncio.to_thread(trunk, ones())

    assert torch.equal(asyncio.run(use()), torch.full((1, 1, 4), 2.0))
