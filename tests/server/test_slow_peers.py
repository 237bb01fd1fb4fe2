"""Peers that send half of what they begin, read nothing, or never stop: bounded, and alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from raw_websocket import BINARY, CLOSE, CONT, PING, RawWebSocket, frame_of, raw_websocket

from splitlearn_manager.server import http_server
from splitlearn_manager.server.http_server import SessionProtocol
from splitlearn_manager.serving.tensors import tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, encode

pytestmark = pytest.mark.anyio

ROWS = 500_000
"""Of an answer that fits into no socket's buffer: 8 MB."""


@pytest.fixture
async def served(serve: Any) -> Any:
    return await serve()


@pytest.fixture
def protocols(monkeypatch: pytest.MonkeyPatch) -> list[SessionProtocol]:
    """Return the server's ends of the WebSockets, as they come; they send no pings of their own."""
    found: list[SessionProtocol] = []

    def start_keepalive(protocol: SessionProtocol) -> None:
        found.append(protocol)

    monkeypatch.setattr(SessionProtocol, "start_keepalive", start_keepalive)
    return found


async def until(condition: Any) -> None:
    """Wait for the other side of a socket, which has no event that a test could wait for."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def step(session: int, position: int = 0, rows: int = 1, request: int = 2) -> Frame:
    wire = tensor_to_wire(TensorName.HIDDEN_STATES, torch.ones(rows, 1, 4))
    return Frame(Kind.STEP, request, session, position, tensors=(wire,))


def small_socket(url: str) -> socket.socket:
    """Return a connected socket that takes in little before somebody reads."""
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((parts.hostname, parts.port))
    return sock


# --- Requests --------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT", 0.1)


@pytest.fixture
async def connection(served: Any) -> Any:
    parts = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    yield reader, writer
    writer.transport.abort()


def request(served: Any, path: str = "/v2/health/live", more: str = "") -> bytes:
    host = urlsplit(served.url).netloc
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Wait for the end of a connection, whatever comes before."""
    with suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 30)
    return True


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"GET /v2/hea", b"GET / HTTP/1.1\r\nHost: a\r\nX-"])
async def test_half_a_request_holds_no_socket(connection: Any, sent: bytes) -> None:
    reader, writer = connection
    writer.write(sent)

    assert await ended(reader)


@pytest.mark.usefixtures("impatient")
async def test_nor_does_half_of_the_next_one(served: Any, connection: Any) -> None:
    reader, writer = connection
    writer.write(request(served))
    assert b"200" in await reader.readuntil(b"\r\n\r\n")
    writer.write(b"GET /v2/hea")

    assert await ended(reader)


@pytest.mark.usefixtures("impatient")
async def test_nor_does_a_body_that_nobody_wants(served: Any, connection: Any) -> None:
    reader, writer = connection
    writer.write(request(served, more="Content-Length: 1000\r\n"))
    assert b"200" in await reader.readuntil(b"\r\n\r\n")

    async with asyncio.timeout(30):
        while not reader.at_eof():  # a byte now and then, which keeps other timers from ending it
            writer.write(b"x")
            try:
                await asyncio.wait_for(reader.read(100), 0.02)
            except TimeoutError:
                continue
            except ConnectionResetError:
                break


@pytest.mark.usefixtures("impatient")
async def test_an_answer_may_take_longer_than_a_request(served: Any, part: Any) -> None:
    """The time is for the head alone: a WebSocket lives on, and so does a slow forward."""
    async with raw_websocket(served.sessions_url()) as client:
        opened = await client.ask(Frame(Kind.OPEN, 1))
        part.gate.clear()
        asking = asyncio.create_task(client.ask(step(opened.session)))
        await asyncio.sleep(0.3)  # three times as long as a head may take
        part.gate.set()

        assert (await asking).kind is Kind.RESULT


# --- WebSockets ------------------------------------------------------------------------------


async def deaf(client: RawWebSocket, protocols: list[SessionProtocol]) -> SessionProtocol:
    """Let an answer be half-way in the client's socket, and never be read.

    Returns the server's end, which is the newest.
    """
    protocol = protocols[-1]
    opened = await client.ask(Frame(Kind.OPEN, 1))
    assert opened.kind is Kind.OPENED
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(frame_of(BINARY, encode(step(opened.session, rows=ROWS))))
    await until(lambda: not protocol.writable.is_set())
    return protocol


@pytest.mark.parametrize("goodbye", ["close", "half-close", "nonsense", "version"])
async def test_a_deaf_client_that_goes_is_let_go(
    served: Any,
    monkeypatch: pytest.MonkeyPatch,
    protocols: list[SessionProtocol],
    goodbye: str,
) -> None:
    """Its socket is closed, but never empty, so that it would stay, and the session with it."""
    monkeypatch.setattr(http_server, "LINGER", 0.1)
    async with raw_websocket(served.sessions_url(), small_socket(served.url)) as client:
        protocol = await deaf(client, protocols)
        match goodbye:
            case "close":
                client.send(frame_of(CLOSE, b"\x03\xe8"))
            case "half-close":
                client.writer.write_eof()
            case "nonsense":
                client.send(b"\xff" * 100)
            case "version":
                client.send(frame_of(CLOSE, b"\x03\xe8", masked=False))

        await until(lambda: served.sessions_open() == 0)
        await until(lambda: not protocol.connections)


async def test_a_deaf_client_gets_no_answers_to_its_pings(
    served: Any, protocols: list[SessionProtocol]
) -> None:
    async with raw_websocket(served.sessions_url(), small_socket(served.url)) as client:
        protocol = await deaf(client, protocols)
        before = protocol.transport.get_write_buffer_size()
        pings = frame_of(PING, b"x" * 100) * 10_000
        for _ in range(10):
            client.send(pings)
            await client.writer.drain()
        # the server has read so far once it has these too: one can't be answered, one has to wait
        client.send(frame_of(BINARY, encode(Frame(Kind.CLOSE, 3, 99))) * 2)
        await until(lambda: protocol.read_paused)

        assert protocol.transport.get_write_buffer_size() <= before + 1000


async def test_pings_are_answered_to_who_listens(served: Any) -> None:
    async with raw_websocket(served.sessions_url()) as client:
        client.send(frame_of(PING, b"a"), frame_of(PING, b"b"))
        await client.ask(Frame(Kind.OPEN, 1))

        assert client.pongs == 2


def pieces(message: bytes, size: int) -> Iterator[bytes]:
    """Yield a message as fragments of so many bytes, with empty ones between."""
    yield frame_of(BINARY, message[:size], fin=False)
    for start in range(size, len(message), size):
        yield frame_of(CONT, b"", fin=False)
        yield frame_of(CONT, message[start : start + size], fin=False)
    yield frame_of(CONT, b"", fin=True)


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_fragments_are_one_message(served: Any, size: int) -> None:
    async with raw_websocket(served.sessions_url()) as client:
        opened = await client.ask(Frame(Kind.OPEN, 1))
        client.send(*pieces(encode(step(opened.session)), size))

        assert (await client.receive()).kind is Kind.RESULT


async def test_fragments_take_no_more_than_their_bytes(
    served: Any, protocols: list[SessionProtocol]
) -> None:
    async with raw_websocket(served.sessions_url()) as client:
        client.send(frame_of(BINARY, b"", fin=False))
        client.send(frame_of(CONT, b"", fin=False) * 10_000, frame_of(CONT, b"x", fin=False) * 999)
        await until(lambda: protocols[0].frames and len(protocols[0].frames[0]) == 999)

        assert len(protocols[0].frames) == 1


async def test_a_message_in_pieces_is_bounded_too(serve: Any) -> None:
    served = await serve(max_frame_bytes=1024)
    async with raw_websocket(served.sessions_url()) as client:
        client.send(*pieces(bytes(2000), 100))

        with pytest.raises(Exception, match="closed with 1009"):
            await client.message()


async def test_who_is_deaf_disturbs_nobody(served: Any, protocols: list[SessionProtocol]) -> None:
    async with (
        raw_websocket(served.sessions_url()) as witness,
        raw_websocket(served.sessions_url(), small_socket(served.url)) as client,
    ):
        opened = await witness.ask(Frame(Kind.OPEN, 1))
        protocol = await deaf(client, protocols)
        held = protocol.transport.get_write_buffer_size()
        for position in range(10):
            client.send(frame_of(BINARY, encode(step(1, position))))  # of no session of its own
            assert (await witness.ask(step(opened.session, position))).position == position + 1

        assert 0 < held <= 16 * ROWS + 100
        assert protocol.transport.get_write_buffer_size() <= held
