"""A stream of server-sent events as the answer to a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from splitlearn_manager.server.http_server import ABORT, HANG_UP
from splitlearn_manager.server.waiting import PATIENCE, client_gone

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

GOODBYE = 2.0
"""Seconds for a client to take in the last of a stream that is broken off."""


class EventLines:
    """Writes events as they come; a client that does not take them loses its connection.

    Attributes:
        begun: Whether the answer has begun, so that its status is out.
        sent: Bytes so far.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.begun = False
        self.sent = 0

    async def write(self, lines: bytes) -> None:
        """Send some events, whole ones.

        Raises:
            ConnectionError: The client takes nothing any more.
        """
        if not self.begun:
            self.begun = True
            start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
            await self._put(start)
        self.sent += len(lines)
        await self._put({"type": "http.response.body", "body": lines, "more_body": True})

    async def end(self) -> None:
        """End the answer well."""
        await self._put({"type": "http.response.body", "body": b""})

    async def break_off(self, lines: bytes) -> None:
        """Send a last event, and end the connection without ending the answer.

        A client takes an answer that ends well for a whole one.
        """
        await self.write(lines)
        self._extension(HANG_UP)
        try:
            async with asyncio.timeout(GOODBYE):
                await client_gone(self._receive)
        except TimeoutError:
            self._extension(ABORT)

    async def _put(self, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._send(message)
        except TimeoutError:
            self._extension(ABORT)
            raise ConnectionError("the client does not read its answer") from None

    def _extension(self, name: str) -> None:
        call = self._scope.get("extensions", {}).get(name)
        if call is not None:
            call()
