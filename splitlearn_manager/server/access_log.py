"""The access log: a line for each request that was answered, and two for each session.

    POST /v2/models/{model}/infer 200 model=trunk bytes_in=812 bytes_out=796 duration_s=0.0041 …
    session opened model=trunk session=0x5f3a91c2 peer=127.0.0.1:50614
    session ended model=trunk session=0x5f3a91c2 reason=closed steps=65 tokens=192 …

Nothing in it is as a client wrote it, but for ids that have the form of one: neither path, query,
headers nor bodies.  Records have the same as fields, which JSON logs show one by one.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitlearn_manager.observability import ACCESS_LOG, CURRENT_REQUEST

if TYPE_CHECKING:
    from splitlearn_manager.server.exchange import Exchange
    from splitlearn_manager.serving.session import Session
    from splitlearn_manager.serving.wire import CloseReason

logger = logging.getLogger(ACCESS_LOG)

CURRENT_PEER: ContextVar[str] = ContextVar("peer")
"""Who sent the request that the code in this context works for."""


@dataclass(frozen=True, slots=True)
class _Opening:
    """Where a session came from: it may end long after, on behalf of somebody else."""

    request_id: str
    peer: str
    at: float


class AccessLog:
    """Writes it; hears of requests from the middleware, and of sessions from their table."""

    def __init__(self) -> None:
        self._sessions: dict[int, _Opening] = {}

    def began(self, exchange: Exchange) -> None:
        """Note who is behind what happens from here on."""
        CURRENT_PEER.set(_shown(exchange.peer))

    def answered(self, exchange: Exchange) -> None:
        """Log a request that was answered, or a WebSocket that was closed."""
        _log(
            f"{exchange.method} {exchange.route} {exchange.status}",
            {"method": exchange.method, "route": exchange.route, "status": exchange.status},
            {
                "model": exchange.model_id,
                "bytes_in": exchange.received,
                "bytes_out": exchange.sent,
                "duration_s": round(exchange.age(), 6),
                "peer": _shown(exchange.peer),
            },
            "request",
            exchange.request_id,
        )

    def session_opened(self, session: Session) -> None:
        """Log a session that was opened, under the id of its connection's request."""
        opening = _Opening(CURRENT_REQUEST.get(""), CURRENT_PEER.get("-"), time.monotonic())
        self._sessions[session.id] = opening
        values = {**_named(session), "peer": opening.peer}
        _log("session opened", {}, values, "session_opened", opening.request_id)

    def session_ended(self, session: Session, reason: CloseReason) -> None:
        """Log a session that has ended, under the id of the request that opened it."""
        opening = self._sessions.pop(session.id)
        values = {
            **_named(session),
            "reason": str(reason),
            "steps": session.steps,
            "tokens": session.tokens,
            "bytes_in": session.received,
            "bytes_out": session.sent,
            "duration_s": round(time.monotonic() - opening.at, 6),
            "peer": opening.peer,
        }
        _log("session ended", {}, values, "session_ended", opening.request_id)


def _named(session: Session) -> dict[str, Any]:
    return {"model": session.model_id, "session": f"{session.id:#010x}"}


def _log(
    what: str, named: dict[str, Any], values: dict[str, Any], event: str, request_id: str
) -> None:
    """Log one line; `named` is in `what` already."""
    shown = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    extra = {**named, **values, "event": event}
    if request_id:
        extra["request_id"] = request_id
    logger.info("%s %s", what, shown, extra=extra)


def _shown(peer: tuple[str, int] | None) -> str:
    """Return an address as text; `-` for a socket that has none."""
    if peer is None:
        return "-"
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
