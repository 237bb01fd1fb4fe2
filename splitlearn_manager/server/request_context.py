"""What every request has: an id, and a place in the metrics."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from splitlearn_manager.observability import CURRENT_REQUEST

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from splitlearn_manager.observability import Metrics

REQUEST_ID = "X-Request-ID"

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BEGINS_ANSWER = frozenset(
    {"http.response.start", "websocket.http.response.start", "websocket.accept"}
)
_UNCOUNTED = ("/metrics", "/v2/health/")


class RequestContextMiddleware:
    """Gives a request its id, which the answer repeats, and counts it when it has been answered.

    A client's own `X-Request-ID` is taken where it has the form of one; anything else is replaced,
    so that nothing strange gets into logs.  Probes and `/metrics` are not counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        request_id = choose_request_id(Headers(scope=scope).get(REQUEST_ID))
        scope.setdefault("state", {})["request_id"] = request_id
        logged = CURRENT_REQUEST.set(request_id)
        started, status = time.perf_counter(), 500
        counted = scope["type"] == "http" and not scope["path"].startswith(_UNCOUNTED)
        self.metrics.request_began(int(counted))

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] in _BEGINS_ANSWER:
                status = message.get("status", 101)
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            CURRENT_REQUEST.reset(logged)
            self.metrics.request_began(-counted)
            if counted:
                self._count(scope, status, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request by its route: paths and methods that clients make up are one each."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.request(route, method, status, seconds)


def choose_request_id(given: str | None) -> str:
    """Return the client's id if it has the form of one, or else a new one."""
    if given is not None and _ACCEPTED_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
