"""uvicorn, as the daemon runs it: without its signals, its logging set-up and its polling start."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

PING_INTERVAL = 20.0
PING_TIMEOUT = 60.0
"""Seconds for a client to answer a ping; the ping waits behind a long answer being sent."""


ABORT = "splitlearn.abort"
"""The extension of a request's scope that drops its connection, with what is still to be sent."""


class HttpProtocol(H11Protocol):
    """HTTP whose applications can drop a connection: a peer that does not read can't be told."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to serve a connection."""
        super().connection_made(transport)
        self.app = partial(_with_abort, self.app, transport.abort)


async def _with_abort(
    app: ASGIApp, abort: Callable[[], None], scope: Scope, receive: Receive, send: Send
) -> None:
    """Call an application that may drop its connection."""
    scope["extensions"] = scope.get("extensions", {}) | {ABORT: abort}
    await app(scope, receive, send)


class SessionProtocol(WebSocketsSansIOProtocol):
    """A WebSocket whose peer is given up, not waited for, when it does not answer pings.

    uvicorn closes such a connection only after all that was written has been taken in, and a peer
    that does not read never takes it in.
    """

    def keepalive_timeout(self) -> None:
        """Say good-bye, and drop the connection with whatever is still to be sent."""
        super().keepalive_timeout()
        self.transport.abort()


class HttpServer(uvicorn.Server):
    """Serves an application on a socket that listens already.

    Attributes:
        listening: Set once connections are accepted.
    """

    def __init__(self, app: ASGIApp, *, max_frame_bytes: int) -> None:
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
