"""Sending an answer that may be long, to a client that may be slow."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_manager.server.http_server import ABORT
from splitlearn_manager.server.waiting import BYTES_PER_SECOND, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from starlette.types import Scope, Send

PIECE = 1 << 20
"""Bytes, about, that are handed to the server at once; it keeps them until they are taken."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: its headers, and its body in pieces."""

    headers: Mapping[str, str]
    pieces: Sequence[bytes | memoryview]

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.pieces))

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers as ASGI has them, with the length."""
        headers = {**self.headers, "Content-Length": str(self.length)}
        return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


async def send_answer(response: Response, scope: Scope, send: Send) -> None:
    """Send an answer, and return when the client has taken most of it.

    A client that takes it too slowly, or not at all, loses its connection: what waits to be sent
    would be kept for it for ever.
    """
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(started + PATIENCE) as deadline:
            headers = response.raw_headers()
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            sent = 0
            for piece in _portions(response.pieces):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                sent += len(piece)
                deadline.reschedule(started + PATIENCE + sent / BYTES_PER_SECOND)
            await send({"type": "http.response.body", "body": b""})
    except TimeoutError:
        abort = scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()


def _portions(pieces: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """Yield the same bytes, in pieces neither much longer nor much shorter than `PIECE`."""
    gathered = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            gathered += piece[start : start + PIECE]
            if len(gathered) >= PIECE:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)
