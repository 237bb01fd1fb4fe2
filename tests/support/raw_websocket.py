"""The client's end of a WebSocket, byte for byte: for what no library would send."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from splitlearn_manager.serving.wire import SUBPROTOCOL, Frame, decode, encode

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

_FIN, _MASKED = 0x80, 0x80
_TWO_BYTES, _EIGHT_BYTES = 126, 127
_MASK = b"\x00\x00\x00\x00"
"""A mask that changes nothing: a server can't tell it from any other."""


class PeerGone(Exception):  # noqa: N818 - it is what is expected
    """The server has ended the connection; has the code that it said, if it said one."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"closed with {code}")
        self.code = code


def frame_of(
    opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, length: int | None = None
) -> bytes:
    """Return a frame; `length` is what it declares, where that is to be another."""
    size = len(payload) if length is None else length
    first = (_FIN if fin else 0) | opcode
    mask = _MASKED if masked else 0
    if size < _TWO_BYTES:
        head = struct.pack("!BB", first, mask | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, mask | _TWO_BYTES, size)
    else:
        head = struct.pack("!BBQ", first, mask | _EIGHT_BYTES, size)
    return head + (_MASK if masked else b"") + payload


@dataclass
class RawWebSocket:
    """A connection on which the handshake was made.

    Attributes:
        reader: Where the server's bytes come from.
        writer: Where bytes go.
        pongs: How many answers to pings came.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pongs: int = 0

    def send(self, *frames: bytes) -> None:
        """Send bytes; they wait here where the server does not read."""
        self.writer.write(b"".join(frames))

    async def ask(self, frame: Frame) -> Frame:
        """Send a good frame, and return what comes next."""
        self.send(frame_of(BINARY, encode(frame)))
        return await self.receive()

    async def receive(self) -> Frame:
        """Return the next frame of the session protocol.

        Raises:
            PeerGone: There is none.
        """
        return decode(await self.message())

    async def message(self) -> bytes:
        """Return the next binary message; pings are answered, pongs counted.

        Raises:
            PeerGone: There is none.
        """
        while True:
            try:
                opcode, payload = await self._frame()
            except (asyncio.IncompleteReadError, OSError):
                raise PeerGone(None) from None
            if opcode == BINARY:
                return payload
            if opcode == CLOSE:
                raise PeerGone(struct.unpack("!H", payload[:2])[0] if payload else 1005)
            if opcode == PING:
                self.send(frame_of(PONG, payload))
            self.pongs += opcode == PONG

    async def _frame(self) -> tuple[int, bytes]:
        """Return the next WebSocket frame; the server sends no fragments."""
        first, size = await self.reader.readexactly(2)
        if size == _TWO_BYTES:
            (size,) = struct.unpack("!H", await self.reader.readexactly(2))
        elif size == _EIGHT_BYTES:
            (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
        return first & 0x0F, await self.reader.readexactly(size)


@asynccontextmanager
async def raw_websocket(
    url: str, sock: socket.socket | None = None, token: str | None = None
) -> AsyncIterator[RawWebSocket]:
    """Connect to `ws://…`, over a socket that is connected already where one is given."""
    parts = urlsplit(url)
    if sock is None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    else:
        reader, writer = await asyncio.open_connection(sock=sock)
    try:
        bearer = "" if token is None else f"Authorization: Bearer {token}\r\n"
        key = base64.b64encode(os.urandom(16)).decode()
        writer.write(
            f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n{bearer}\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise ConnectionError(f"no WebSocket: {head!r}")
        yield RawWebSocket(reader, writer)
    finally:
        writer.transport.abort()
