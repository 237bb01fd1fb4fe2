"""One request and its answer, or one WebSocket, as logs and traces tell of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitlearn_manager.config.fields import MODEL_ID

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

UNMATCHED = "unmatched"
"""The route of whatever no route took: paths that clients make up are one and the same."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CONTENT = {
    "http.request": "body",
    "http.response.body": "body",
    "websocket.receive": "bytes",
    "websocket.send": "bytes",
}


@dataclass(slots=True)
class Exchange:
    """What is known of it by now.

    Attributes:
        scope: Its ASGI scope, which the router completes.
        request_id: Its id.
        status: Of the answer, 101 for a WebSocket; 500 until there is one.
        received: Bytes of the body, or of messages, so far.
        sent: Those of the answer, likewise.
        started: When it came, on the clock of `time.perf_counter`.
    """

    scope: Scope
    request_id: str
    status: int = 500
    received: int = 0
    sent: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def method(self) -> str:
        """The method, `other` for one that a client made up; a WebSocket begins with a GET."""
        method: str = self.scope.get("method", "GET")
        return method if method in _METHODS else "other"

    @property
    def route(self) -> str:
        """The route that took it: a pattern, never the path itself."""
        return getattr(self.scope.get("route"), "path", UNMATCHED)

    @property
    def model_id(self) -> str | None:
        """The model that the path names, if that can be an id; it need not be there."""
        named = self.scope.get("path_params", {}).get("model", "")
        return named if MODEL_ID.fullmatch(named) else None

    @property
    def peer(self) -> tuple[str, int] | None:
        """Address and port of the other side, as the socket has it; headers may say anything."""
        client: tuple[str, int] | None = self.scope.get("client")
        return client

    def age(self) -> float:
        """Return the seconds since it came."""
        return time.perf_counter() - self.started

    def counting(self, receive: Receive) -> Receive:
        """Return a `receive` that counts what comes."""

        async def counted() -> Message:
            message = await receive()
            self.received += size_of(message)
            return message

        return counted


def size_of(message: Message) -> int:
    """Return how many bytes of content an ASGI message has."""
    key = _CONTENT.get(message["type"])
    return 0 if key is None else len(message.get(key) or b"")
