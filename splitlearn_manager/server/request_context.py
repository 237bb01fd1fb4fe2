"""What every request has: an id, and a place in metrics, logs and traces."""

from __future__ import annotations

import re
import uuid
from contextlib import nullcontext
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from splitlearn_manager.observability import CURRENT_REQUEST
from splitlearn_manager.server.exchange import Exchange, size_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from contextvars import Token

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from splitlearn_manager.observability import Metrics
    from splitlearn_manager.server.access_log import AccessLog
    from splitlearn_manager.tracing import Tracing

REQUEST_ID = "X-Request-ID"

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)
_BEGINS_ANSWER = frozenset(
    {"http.response.start", "websocket.http.response.start", "websocket.accept"}
)
_PROBES = ("/metrics", "/v2/health/")


class RequestContextMiddleware:
    """Gives a request its id, which the answer repeats, and tells of it when it was answered.

    A client's own `X-Request-ID` is taken where it has the form of one; anything else is replaced,
    so that nothing strange gets into logs.  Probes and `/metrics` are neither counted, logged nor
    traced.

    Args:
        app: Who answers.
        metrics: Where requests are counted; WebSockets are not.
        access_log: Where they are logged, if they are.
        tracing: Where they are spans, if they are.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        access_log: AccessLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.access_log = access_log
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        request_id = choose_request_id(Headers(scope=scope).get(REQUEST_ID))
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = Exchange(scope, request_id)
        told = not scope["path"].startswith(_PROBES)
        access_log = self.access_log if told else None
        counted = told and scope["type"] == "http"
        logged: Token[str] | None = CURRENT_REQUEST.set(request_id)
        self.metrics.request_began(int(counted))
        if access_log is not None:
            access_log.began(exchange)
            receive = exchange.counting(receive)

        async def answer(message: Message) -> None:
            if message["type"] in _BEGINS_ANSWER:
                exchange.status = message.get("status", 101)
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)
            exchange.sent += size_of(message)

        try:
            with self._traced(exchange, told=told):
                await self.app(scope, receive, answer)
        except Exception:
            logged = None  # whoever logs it further up does so under the same id
            raise
        finally:
            self.metrics.request_began(-counted)
            if counted:
                self.metrics.request(
                    exchange.route, exchange.method, exchange.status, exchange.age()
                )
            if access_log is not None:
                access_log.answered(exchange)
            if logged is not None:
                CURRENT_REQUEST.reset(logged)

    def _traced(self, exchange: Exchange, *, told: bool) -> AbstractContextManager[object]:
        """Return what makes a span of it, or nothing."""
        if self.tracing is None or not told:
            return nullcontext()
        return self.tracing.request(exchange)


def choose_request_id(given: str | None) -> str:
    """Return the client's id if it has the form of one, or else a new one."""
    if given is not None and _ACCEPTED_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
