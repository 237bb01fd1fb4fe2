"""uvicorn, as the daemon runs it: without its signals, its logging set-up and its polling start."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn._types import ASGISendEvent
    from websockets.frames import Frame

PING_INTERVAL = 20.0
PING_TIMEOUT = 60.0
"""Seconds for a client to answer a ping; the ping waits behind a long answer being sent."""


HEAD_TIMEOUT = 20.0
"""Seconds for the first line and the headers of a request."""

LINGER = 10.0
"""Seconds for a peer to take in the last of what it is sent."""

ABORT = "splitlearn.abort"
"""The extension of a request's scope that drops its connection, with what is still to be sent."""

HANG_UP = "splitlearn.hang_up"
"""The extension that ends it when all has been sent, whether the answer is at its end or not."""


class _Abandons(asyncio.Protocol):
    """What a connection that ends has to do with a peer that does not read.

    A transport that is closed waits until all that was written has been taken in, and a peer that
    does not read never takes it in.  So it is dropped some seconds later, with what is left.
    """

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _abandoning: asyncio.TimerHandle | None = None

    def abandon_soon(self) -> None:
        """Drop the connection in a while, unless it has ended by then."""
        if self._abandoning is None:
            self._abandoning = self.loop.call_later(LINGER, self.transport.abort)

    def stay(self) -> None:
        """Forget that: the connection has ended."""
        if self._abandoning is not None:
            self._abandoning.cancel()


class HttpProtocol(_Abandons, H11Protocol):
    """HTTP whose peers can't hold a connection: not by reading nothing, nor by asking slowly.

    The head of a request has to come within `HEAD_TIMEOUT` of its first byte, or of the connection;
    bodies are those of applications, which can drop a connection (`ABORT`): a peer that does not
    read can't be told.
    """

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to serve a connection."""
        super().connection_made(transport)
        self.app = partial(_with_abort, self.app, transport, self.abandon_soon)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take in some bytes, and mind how long the rest of a request takes."""
        super().data_received(data)
        answered = self.conn.our_state is h11.DONE  # and the body goes on, which nobody wants
        if self.conn.their_state is h11.IDLE or answered:
            self._expect_head()
        else:
            self._have_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._have_head()
        self.stay()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Hear that no more will come; what was asked for is still answered."""
        super().eof_received()
        self.abandon_soon()

    def timeout_keep_alive_handler(self) -> None:
        """End a connection on which nothing more was asked."""
        super().timeout_keep_alive_handler()
        self.abandon_soon()

    def _expect_head(self) -> None:
        """Drop the connection unless a request's head comes in time."""
        if self._head is None:
            self._head = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def _have_head(self) -> None:
        """Wait for none."""
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over."""
        self._have_head()
        super().handle_websocket_upgrade(event)


async def _with_abort(
    app: ASGIApp,
    transport: asyncio.Transport,
    abandon_soon: Callable[[], None],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Call an application that may drop its connection."""

    def hang_up() -> None:
        transport.close()
        abandon_soon()

    scope["extensions"] = scope.get("extensions", {}) | {
        ABORT: transport.abort,
        HANG_UP: hang_up,
    }
    await app(scope, receive, send)


class SessionProtocol(_Abandons, WebSocketsSansIOProtocol):
    """A WebSocket whose peer can't make the server hold more than a message and its answers.

    - A peer that does not read is given up, not waited for: when it does not answer pings, and
      when it, or the server, ends the connection.
    - Its pings are not answered meanwhile: the answers would pile up.
    - Fragments are put together as they come: a message of single bytes would take fifty times its
      length in pieces, and empty ones would never end.
    """

    def keepalive_timeout(self) -> None:
        """Say good-bye, and drop the connection with whatever is still to be sent."""
        super().keepalive_timeout()
        self.transport.abort()

    def handle_ping(self) -> None:
        """Answer a ping, if the peer takes in what it is sent."""
        pong = self.conn.data_to_send()
        if self.writable.is_set():
            self.transport.write(b"".join(pong))

    def handle_cont(self, event: Frame) -> None:
        """Put a fragment to those before it."""
        if not isinstance(self.frames[0], bytearray):
            self.frames[0] = bytearray(self.frames[0])  # type: ignore[call-overload]
        self.frames[0] += event.data
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        """Hand a message on; of text, only that it is some: nobody here reads any."""
        if self.curr_msg_data_type == "text":
            self.frames = [b""]
        super().send_receive_event_to_app()

    def handle_close(self, event: Frame) -> None:
        """Hear the peer's good-bye."""
        super().handle_close(event)
        self.abandon_soon()

    def handle_parser_exception(self) -> None:
        """End a connection whose frames are none."""
        super().handle_parser_exception()
        self.abandon_soon()

    def eof_received(self) -> None:
        """Hear that no more will come."""
        super().eof_received()
        self.abandon_soon()

    async def send(self, message: ASGISendEvent) -> None:
        """Send what the application says."""
        if message["type"] == "websocket.close":
            self.abandon_soon()  # also where it can't be said, because the peer does not read
        await super().send(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self.stay()
        super().connection_lost(exc)


class HttpServer(uvicorn.Server):
    """Serves an application on a socket that listens already.

    Args:
        app: The application.
        max_frame_bytes: Longest WebSocket message that is read.
        tls: How to speak https and wss; plain HTTP where left out.

    Attributes:
        listening: Set once connections are accepted.
    """

    def __init__(
        self, app: ASGIApp, *, max_frame_bytes: int, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws=SessionProtocol,
                ws_max_size=max_frame_bytes,
                ws_per_message_deflate=False,  # hidden states don't compress, and it costs 50 times
                ws_ping_interval=PING_INTERVAL,
                ws_ping_timeout=PING_TIMEOUT,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing here trusts where a request says it comes from
                server_header=False,
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )
        self.listening = asyncio.Event()
        self._stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self.listening.set()

    def stop(self, grace: float) -> None:
        """Let `serve` return, `grace` seconds later at most for requests in flight."""
        self.config.timeout_graceful_shutdown = grace  # type: ignore[assignment]  # any number does
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Keep the `Date` header right until told to stop, with one look a second, not ten."""
        while not self.should_exit:
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon."""
        yield
