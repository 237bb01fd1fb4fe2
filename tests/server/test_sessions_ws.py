"""Sessions over a real socket: a real daemon, and a client that speaks frames by hand."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from serving_fakes import trunk_config
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from splitlearn_manager.observability import Metrics
from splitlearn_manager.server import http_server
from splitlearn_manager.server.http_server import SessionProtocol
from splitlearn_manager.server.sessions_ws import SessionEndpoint
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import (
    SUBPROTOCOL,
    Frame,
    Kind,
    TensorName,
    decode,
    encode,
)

pytestmark = pytest.mark.anyio


class Client:
    """A connection that sends and receives frames."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, frame: Frame) -> None:
        await self.socket.send(encode(frame))

    async def receive(self) -> Frame:
        message = await asyncio.wait_for(self.socket.recv(decode=False), 30)
        return decode(message)

    async def ask(self, frame: Frame) -> Frame:
        await self.send(frame)
        return await self.receive()

    async def open(self, **info: Any) -> int:
        opened = await self.ask(Frame(Kind.OPEN, 1, info=info))
        assert opened.kind is Kind.OPENED
        return opened.session


@asynccontextmanager
async def connected(url: str, **kwargs: Any) -> AsyncIterator[Client]:
    async with connect(
        url, subprotocols=[SUBPROTOCOL], compression=None, max_size=None, **kwargs
    ) as socket:
        yield Client(socket)


@pytest.fixture
async def served(serve: Any) -> Any:
    return await serve()


@pytest.fixture
async def client(served: Any) -> AsyncIterator[Client]:
    async with connected(served.sessions_url()) as client:
        yield client


def step(session: int, position: int = 0, new: int = 1, request: int = 2) -> Frame:
    hidden = tensor_to_wire(TensorName.HIDDEN_STATES, torch.ones(1, new, 4))
    return Frame(Kind.STEP, request, session, position, tensors=(hidden,))


async def until(condition: Any) -> None:
    """Wait for the other side of a socket, which has no event that a test could wait for."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def entered(part: Any) -> None:
    """Wait until a forward has begun."""
    assert await asyncio.to_thread(part.entered.acquire, timeout=30)


async def test_a_session_from_open_to_closed(client: Client) -> None:
    opened = await client.ask(Frame(Kind.OPEN, 7))
    first = await client.ask(step(opened.session, 0, new=3, request=8))
    second = await client.ask(step(opened.session, 3, request=9))
    closed = await client.ask(Frame(Kind.CLOSE, 10, opened.session))

    assert client.socket.subprotocol == SUBPROTOCOL
    assert (opened.kind, opened.request) == (Kind.OPENED, 7)
    assert opened.info == {
        "session": opened.session,
        "hidden_size": 4,
        "dtype": "float32",
        "max_length": 16,
        "idle_timeout": 300.0,
        "max_frame_bytes": 64 << 20,
    }
    assert (first.kind, first.request, first.position) == (Kind.RESULT, 8, 3)
    assert torch.equal(tensor_from_wire(first.tensors[0]), torch.full((1, 3, 4), 2.0))
    assert (second.request, second.position) == (9, 4)
    assert (closed.kind, closed.request, closed.info) == (Kind.CLOSED, 10, {"reason": "closed"})


async def test_a_connection_holds_several_sessions_each_with_its_length(client: Client) -> None:
    one, other = await client.open(), await client.open(max_length=2)

    await client.ask(step(one, 0, new=3))
    result = await client.ask(step(other, 0, new=2))
    refused = await client.ask(step(other, 2))

    assert one != other
    assert (result.session, result.position) == (other, 2)
    assert refused.info["code"] == "too_long"


async def test_who_asks_for_it_hears_how_long_steps_took_and_nobody_else(client: Client) -> None:
    timed, other = await client.open(timings=True), await client.open(timings=False)

    first = await client.ask(step(timed, 0, new=3))
    second = await client.ask(step(timed, 3))
    fork = (await client.ask(Frame(Kind.FORK, 4, timed))).session

    for answer in (first, second, await client.ask(step(fork, 4))):
        assert {name: type(value) for name, value in answer.info.items()} == {
            "queue_us": int,
            "forward_us": int,
        }
        assert min(answer.info.values()) >= 0
    assert (await client.ask(step(other))).info == {}


async def test_the_handshake_has_a_request_id(served: Any) -> None:
    headers = {"X-Request-ID": "abc"}
    async with connected(served.sessions_url(), additional_headers=headers) as client:
        assert client.socket.response.headers["X-Request-ID"] == "abc"


async def test_no_deflate_is_agreed_on(served: Any) -> None:
    async with connect(served.sessions_url(), subprotocols=[SUBPROTOCOL]) as socket:
        assert socket.protocol.extensions == []


async def refusal(served: Any, model_id: str = "trunk", **kwargs: Any) -> tuple[int, str]:
    """Return status and text of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        await connect(
            served.sessions_url(model_id), **{"subprotocols": [SUBPROTOCOL], **kwargs}
        ).__aenter__()
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]


async def test_a_handshake_is_refused_in_the_words_of_http(
    served: Any, manager: Any, loader: Any
) -> None:
    await manager.load_model(trunk_config("top"))
    loader.gate.clear()
    loading = asyncio.create_task(manager.load_model(trunk_config("late")))
    await until(lambda: "late" in manager.models)

    assert await refusal(served, "nothing") == (
        404,
        "there is no model 'nothing'; there are: trunk, top, late",
    )
    assert await refusal(served, "late") == (503, "model 'late' is being loaded")
    status, text = await refusal(served, "top")
    assert (status, "this is 'top'" in text) == (400, True)
    assert await refusal(served, subprotocols=None) == (
        400,
        "offer the WebSocket subprotocol splitlearn.v1",
    )
    assert await refusal(served, additional_headers={"Origin": "http://evil.example"}) == (
        403,
        "pages of other origins may not use this server",
    )

    loader.gate.set()
    await loading


async def test_a_refused_frame_is_answered_and_the_connection_goes_on(client: Client) -> None:
    session = await client.open()
    await client.socket.send(encode(step(session, request=5))[:-1])

    error = await client.receive()
    assert (error.kind, error.request, error.session) == (Kind.ERROR, 5, session)
    assert error.info["code"] == "bad_frame"
    assert "declare 16 bytes of data, but 15 follow" in error.info["message"]
    assert (await client.ask(step(session))).kind is Kind.RESULT


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (Frame(Kind.RESULT, 5), "bad_frame"),
        (Frame(Kind.OPENED, 5), "bad_frame"),
        (Frame(Kind.OPEN, 5, info={"max_length": "x"}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"length": 1}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"traceparent": 1}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"timings": 1}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"max_length": 10**4000}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"max_length": 2, "rows": 10**4000}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"rows": 4097}), "bad_open"),
        (Frame(Kind.OPEN, 5, info={"max_length": 17}), "too_long"),
        (Frame(Kind.CLOSE, 5, 99), "unknown_session"),
        (step(99, request=5), "unknown_session"),
    ],
)
async def test_what_can_not_be_done_is_said(client: Client, frame: Frame, code: str) -> None:
    error = await client.ask(frame)

    assert (error.kind, error.request, error.session) == (Kind.ERROR, 5, frame.session)
    assert error.info["code"] == code
    assert (await client.ask(Frame(Kind.OPEN, 6))).kind is Kind.OPENED


@pytest.mark.parametrize("token", ["", "x", "0" * 32, "é", "\ud800", "\x00" * 10_000])
async def test_no_other_token_resumes_a_session(client: Client, token: str) -> None:
    session = await client.open(resume=True)

    error = await client.ask(Frame(Kind.RESUME, 5, session, info={"resume": token}))

    assert (error.request, error.info["code"]) == (5, "unknown_session")
    assert (await client.ask(step(session))).kind is Kind.RESULT


async def test_an_error_repeats_no_more_than_a_little(client: Client) -> None:
    error = await client.ask(Frame(Kind.OPEN, 5, info={"\x00" * 10_000: 1}))

    assert error.info["code"] == "bad_open"
    assert len(error.info["message"]) == 1000


async def test_without_a_readable_header_the_connection_ends(client: Client) -> None:
    await client.socket.send(b"\x02" + bytes(15))

    assert (await client.receive()).info["code"] == "bad_frame"
    with pytest.raises(ConnectionClosed) as caught:
        await client.receive()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1002


async def test_text_is_no_frame(client: Client) -> None:
    await client.socket.send("hello")

    with pytest.raises(ConnectionClosed) as caught:
        await client.receive()
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (
        1003,
        "frames are binary messages",
    )


async def test_a_frame_that_is_too_long_ends_the_connection(serve: Any) -> None:
    served = await serve(max_frame_bytes=1024)
    async with connected(served.sessions_url()) as client:
        session = await client.open()
        with pytest.raises(ConnectionClosed) as caught:
            await client.ask(step(session, new=64))

    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1009
    await until(lambda: served.sessions_open() == 0)


async def test_a_second_step_is_refused_while_the_first_is_in_flight(
    client: Client, part: Any
) -> None:
    session = await client.open()
    part.gate.clear()
    await client.send(step(session, request=5))
    await entered(part)

    refused = await client.ask(step(session, request=6))

    assert (refused.request, refused.info["code"]) == (6, "bad_step")
    part.gate.set()
    assert (await client.receive()).request == 5


async def test_another_session_goes_on_beside_a_step_in_flight(client: Client, part: Any) -> None:
    busy, other = await client.open(), await client.open()
    part.gate.clear()
    await client.send(step(busy, request=5))
    await entered(part)

    closed = await client.ask(Frame(Kind.CLOSE, 6, other))

    assert (closed.kind, closed.session) == (Kind.CLOSED, other)
    part.gate.set()
    assert (await client.receive()).request == 5


async def test_closing_waits_for_the_step_in_flight(client: Client, part: Any) -> None:
    session = await client.open()
    part.gate.clear()
    await client.send(step(session, request=5))
    await entered(part)
    await client.send(Frame(Kind.CLOSE, 6, session))
    again = await client.ask(Frame(Kind.CLOSE, 7, session))

    part.gate.set()
    result, closed = await client.receive(), await client.receive()

    assert (again.request, again.info["code"]) == (7, "unknown_session")

    assert (result.kind, result.request) == (Kind.RESULT, 5)
    assert (closed.kind, closed.request) == (Kind.CLOSED, 6)


async def test_a_failed_step_is_told_and_ends_its_session(client: Client, part: Any) -> None:
    session = await client.open()
    part.fail_with = RuntimeError("secret detail")

    error = await client.ask(step(session, request=5))
    closed = await client.receive()

    assert (error.request, error.info["code"]) == (5, "internal")
    assert "secret" not in error.info["message"]
    assert (closed.kind, closed.request, closed.session) == (Kind.CLOSED, 0, session)
    assert closed.info == {"reason": "internal"}


async def test_a_dropped_connection_frees_its_sessions(served: Any) -> None:
    async with connected(served.sessions_url()) as client:
        await client.open()
        await client.open()
        assert served.sessions_open() == 2
        client.socket.transport.abort()

    await until(lambda: served.sessions_open() == 0)


async def test_a_dropped_connection_frees_a_busy_session_when_its_step_ends(
    served: Any, part: Any, manager: Any
) -> None:
    async with connected(served.sessions_url()) as client:
        await client.open()
        part.gate.clear()
        await client.send(step(await client.open()))
        await entered(part)
        client.socket.transport.abort()
    await until(lambda: served.sessions_open() == 1)

    part.gate.set()
    await until(lambda: served.sessions_open() == 0)
    await until(lambda: manager.models["trunk"].in_flight == 0)


async def test_an_unloaded_model_ends_its_sessions(client: Client, manager: Any) -> None:
    session = await client.open()

    await manager.unload_model("trunk", drain_timeout=0)

    closed = await client.receive()
    assert (closed.kind, closed.request, closed.session) == (Kind.CLOSED, 0, session)
    assert closed.info == {"reason": "model_unloaded"}
    error = await client.ask(Frame(Kind.OPEN, 3))
    assert error.info["code"] == "model_unavailable"


async def test_sessions_are_limited_over_all_connections(serve: Any) -> None:
    served = await serve(max_sessions=1)
    async with (
        connected(served.sessions_url()) as one,
        connected(served.sessions_url()) as other,
    ):
        await one.open()
        refused = await other.ask(Frame(Kind.OPEN, 3))

    assert refused.info["code"] == "too_many_sessions"


async def test_draining_tells_idle_sessions_and_answers_busy_ones(served: Any, part: Any) -> None:
    async with connected(served.sessions_url()) as client:
        idle, busy = await client.open(), await client.open()
        part.gate.clear()
        await client.send(step(busy, request=5))
        await entered(part)

        served.daemon.stop()
        told = await client.receive()
        late = await refusal(served)
        part.gate.set()
        answered, ended = await client.receive(), await client.receive()
        with pytest.raises(ConnectionClosed) as caught:
            await client.receive()

    assert (told.kind, told.session, told.info) == (Kind.CLOSED, idle, {"reason": "draining"})
    assert late == (503, "the server is shutting down")
    assert (answered.kind, answered.request) == (Kind.RESULT, 5)
    assert (ended.session, ended.info) == (busy, {"reason": "draining"})
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (1001, "draining")
    assert await served.serving == 0


async def test_a_step_that_is_not_answered_in_time_costs_the_clean_exit(
    serve: Any, part: Any
) -> None:
    served = await serve(drain_timeout=0)
    async with connected(served.sessions_url()) as client:
        session = await client.open()
        part.gate.clear()
        await client.send(step(session))
        await entered(part)

        code = await served.stop()

        closed = await client.receive()
        assert (closed.session, closed.info) == (session, {"reason": "draining"})
    part.gate.set()
    assert code == 1


class DeafPeer:
    """The other end of a WebSocket: it sends as much as is read, and reads when the test says so.

    Both are the two callables of ASGI.
    """

    def __init__(self, frame: Frame, count: int) -> None:
        self.incoming = [encode(frame)] * count
        self.sent: list[Any] = []
        self.reads = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if not self.sent:
            return {"type": "websocket.connect"}
        if not self.incoming:
            return {"type": "websocket.disconnect", "code": 1000}
        return {"type": "websocket.receive", "bytes": self.incoming.pop()}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "websocket.send":
            await self.reads.wait()


@pytest.mark.parametrize("frame", [Frame(Kind.OPEN, 1), Frame(Kind.CLOSE, 1, 99)])
async def test_a_client_that_does_not_read_is_not_read_either(manager: Any, frame: Frame) -> None:
    peer = DeafPeer(frame, 100)
    scope = {"type": "websocket", "path": "/", "headers": [], "subprotocols": [SUBPROTOCOL]}
    websocket = WebSocket({**scope, "path_params": {"model": "trunk"}}, peer.receive, peer.send)
    async with SessionTable(
        manager, max_sessions=100, idle_timeout=300, metrics=Metrics()
    ) as table:
        endpoint = SessionEndpoint(manager, table, Metrics(), max_frame_bytes=1024)
        serving = asyncio.create_task(endpoint.connect(websocket))
        await until(lambda: len(peer.sent) == 2)

        assert len(peer.incoming) == 99
        peer.reads.set()
        await serving

        assert len(peer.sent) == 101
        assert len(table) == 0


def small_socket(url: str) -> socket.socket:
    """Return a connected socket that takes in little before somebody reads."""
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((parts.hostname, parts.port))
    return sock


async def test_a_client_that_stopped_reading_is_given_up(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an answer half-way in its socket, which it will never take in, and answers no ping."""
    protocols: list[SessionProtocol] = []

    def start_keepalive(protocol: SessionProtocol) -> None:
        protocols.append(protocol)

    monkeypatch.setattr(http_server, "PING_TIMEOUT", 0.1)
    monkeypatch.setattr(SessionProtocol, "start_keepalive", start_keepalive)
    served = await serve()
    async with connected(served.sessions_url(), sock=small_socket(served.url)) as client:
        session = await client.open()
        client.socket.transport.pause_reading()
        rows = tensor_to_wire(TensorName.HIDDEN_STATES, torch.ones(500_000, 1, 4))
        await client.send(Frame(Kind.STEP, 2, session, tensors=(rows,)))
        await until(lambda: served.steps("ok") == 1)
        assert served.sessions_open() == 1
        protocols[0].send_keepalive_ping()

        await until(lambda: served.sessions_open() == 0)
        client.socket.transport.abort()


def mutated(rng: random.Random, message: bytes) -> bytes:
    """Return a frame with some bytes changed, cut off or put to it."""
    data = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        match rng.randint(0, 3):
            case 0:
                data[rng.randrange(len(data)) :] = b""
            case 1:
                data += rng.randbytes(rng.randint(1, 20))
            case _ if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        if not data:
            return b""
    return bytes(data)


async def test_a_hail_of_bad_frames_leaves_nothing_behind(served: Any) -> None:
    rng = random.Random(2024)  # noqa: S311 - the same hail each time
    tasks = len(asyncio.all_tasks())
    for _ in range(20):
        async with connected(served.sessions_url()) as client:
            session = await client.open()
            good = [encode(step(session)), encode(Frame(Kind.CLOSE, 3, session))]
            good.append(encode(Frame(Kind.OPEN, 4, info={"max_length": 3})))
            try:
                for _ in range(20):
                    await client.socket.send(mutated(rng, rng.choice(good)))
            except ConnectionClosed:
                continue

    await until(lambda: served.sessions_open() == 0)
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    async with connected(served.sessions_url()) as client:
        assert (await client.ask(step(await client.open()))).kind is Kind.RESULT
