"""The client's WebSocket against the library's own server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from websockets.exceptions import InvalidHandshake
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from splitlearn_manager.client.websocket import WebSocket, WebSocketLost


@contextmanager
def connected(
    handler: Callable[[ServerConnection], None], subprotocol: str = "a"
) -> Iterator[WebSocket]:
    """Connect to a server in a thread."""
    protocols = [Subprotocol("a")]
    with serve(
        handler, "127.0.0.1", 0, subprotocols=protocols, max_size=None, max_queue=1
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = server.socket.getsockname()[1]
            websocket = WebSocket(
                socket.create_connection(("127.0.0.1", port)),
                f"ws://127.0.0.1:{port}/",
                subprotocol=subprotocol,
                headers={},
                tls=None,
                handshake_timeout=30,
                send_timeout=30,
            )
            with closing(websocket):
                yield websocket
        finally:
            server.shutdown()
            thread.join()


def echo(peer: ServerConnection) -> None:
    for message in peer:
        peer.send(message)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 70_000, 3_000_000])
def test_a_message_comes_back(size: int) -> None:
    with connected(echo) as websocket:
        websocket.send(b"x" * size)

        assert websocket.receive(30) == b"x" * size


def test_fragments_are_one_message() -> None:
    with connected(lambda peer: peer.send([b"ab", b"", b"c"])) as websocket:
        assert websocket.receive(30) == b"abc"


def test_messages_keep_their_order() -> None:
    with connected(echo) as websocket:
        for number in range(5):
            websocket.send(bytes([number]))

        assert [websocket.receive(30) for _ in range(5)] == [bytes([n]) for n in range(5)]


def test_what_was_sent_before_the_end_is_received() -> None:
    with connected(lambda peer: peer.send(b"last")) as websocket:
        assert websocket.receive(30) == b"last"
        with pytest.raises(WebSocketLost, match="closed by the server: 1000"):
            websocket.receive(30)
        with pytest.raises(WebSocketLost):
            websocket.send(b"more")


def test_the_end_says_why() -> None:
    with (
        connected(lambda peer: peer.close(1001, "draining")) as websocket,
        pytest.raises(WebSocketLost, match=r"1001 \(going away\) draining"),
    ):
        websocket.receive(30)


def test_a_ping_is_answered_by_who_waits() -> None:
    answered = threading.Event()

    def ping(peer: ServerConnection) -> None:
        if peer.ping().wait(30):
            answered.set()
            peer.send(b"thanks")

    with connected(ping) as websocket:
        assert websocket.receive(30) == b"thanks"
        assert answered.is_set()


def test_a_ping_is_answered_by_who_tends() -> None:
    answered = threading.Event()

    def ping(peer: ServerConnection) -> None:
        if peer.ping().wait(30):
            answered.set()

    with connected(ping) as websocket:
        while not answered.is_set():
            websocket.tend()


def test_tending_keeps_messages() -> None:
    with connected(lambda peer: peer.send(b"early")) as websocket:
        while websocket.is_open:
            websocket.tend()

        assert websocket.receive(0) == b"early"


def test_a_message_may_come_after_the_time_for_it() -> None:
    go_on = threading.Event()

    def late(peer: ServerConnection) -> None:
        go_on.wait(30)
        peer.send(b"late")

    with connected(late) as websocket:
        with pytest.raises(TimeoutError):
            websocket.receive(0.001)
        go_on.set()

        assert websocket.receive(30) == b"late"


def test_a_server_of_another_protocol_is_refused() -> None:
    with pytest.raises(InvalidHandshake), connected(echo, "b"):
        raise AssertionError("the handshake must fail")


def test_a_connection_that_breaks_is_lost() -> None:
    def vanish(peer: ServerConnection) -> None:
        peer.socket.shutdown(socket.SHUT_RDWR)

    with connected(vanish) as websocket, pytest.raises(WebSocketLost, match="is gone"):
        websocket.receive(30)


def test_messages_that_fill_both_directions_pass() -> None:
    """The echo reads no further while what it sent is not read."""
    message = b"x" * 8_000_000
    with connected(echo) as websocket:
        websocket.send(*[message] * 6)

        assert all(websocket.receive(30) == message for _ in range(6))
