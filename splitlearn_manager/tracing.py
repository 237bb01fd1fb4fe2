"""OpenTelemetry traces of a daemon; OpenTelemetry is an extra, and imported where it is wanted.

A daemon traces where its configuration or the standard variables say so (`start`); else nothing of
OpenTelemetry is imported.

    request          SERVER; one HTTP request or WebSocket, in the trace that its traceparent names
    ├── session      one session, in the trace of whoever opened it
    │   └── step     one step
    │       ├── queue     until its turn
    │       └── forward   until its answer: all turns, where a prompt took several
    ├── queue, forward    of an inference request
    └── load         one load of a model, with its phases as events

Attributes are names, sizes and outcomes; never a token of either kind, a hidden state or a text.

Clients send the span that they run in (`splitlearn_manager.trace_context`).
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING, Any

from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import ConfigError, Problem
from splitlearn_manager.observability import version
from splitlearn_manager.trace_context import TRACEPARENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from splitlearn_manager.core.events import ProgressEvent, ReloadFailedEvent, TransitionEvent
    from splitlearn_manager.server.exchange import Exchange
    from splitlearn_manager.serving.batcher import Turn
    from splitlearn_manager.serving.session import Session
    from splitlearn_manager.serving.wire import CloseReason

logger = logging.getLogger(__name__)

LAST_EXPORT = 1.0
"""Seconds that the end of a daemon gives to what was not exported yet."""

NEEDED = "opentelemetry.exporter.otlp.proto.http"
_SERVER_ERROR = 500
_LONGEST_PATH = 256
_NS = 1_000_000_000


def start(wanted: bool, environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """Begin to trace, if that is wanted here or by the standard variables.

    These are `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or
    `OTEL_TRACES_EXPORTER=otlp`; `OTEL_SDK_DISABLED=true` and `OTEL_TRACES_EXPORTER=none` win over
    all.  Spans go out as OTLP over HTTP.

    Raises:
        ConfigError: It is wanted here, and OpenTelemetry is not installed.
    """
    if not (wanted or _asked_for(environ)) or _forbidden(environ):
        return None
    if _is_installed():
        return Tracing(_provider())
    message = "tracing needs OpenTelemetry: pip install 'splitlearn[otel]'"
    if wanted:
        raise ConfigError(Problem(message, ("server", "tracing")))
    logger.warning("%s; OTEL_ variables ask for it, and there will be no traces", message)
    return None


def _asked_for(environ: Mapping[str, str]) -> bool:
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return environ.get("OTEL_TRACES_EXPORTER") == "otlp" or any(map(environ.get, endpoints))


def _forbidden(environ: Mapping[str, str]) -> bool:
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return disabled or environ.get("OTEL_TRACES_EXPORTER") == "none"


def _is_installed() -> bool:
    try:
        return find_spec(NEEDED) is not None
    except ImportError:  # of a package above it
        return False


def _provider() -> TracerProvider:
    """Return what makes spans and sends them, as the standard variables say how and where."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - optional
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create({"service.version": version()})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "splitlearn"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Makes the spans of one daemon.

    Everything runs on the event loop's thread.

    Args:
        provider: What makes them; it is shut down at the end.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("splitlearn", version())
        self._sessions: dict[int, Span] = {}
        self._loads: dict[str, tuple[Span, str]] = {}  # operation -> span, phase
        self._over: deque[str] = deque(maxlen=256)  # operations: news of them may come late

    def stop(self) -> None:
        """Send what is left, if that takes not too long: nobody's end waits for a collector."""
        for span in (*self._sessions.values(), *(span for span, _ in self._loads.values())):
            span.end()
        thread = Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        thread.start()
        thread.join(LAST_EXPORT)

    # --- Requests --------------------------------------------------------------------------

    @contextmanager
    def request(self, exchange: Exchange) -> Iterator[None]:
        """Let a block be the span of a request, or of a WebSocket."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - optional

        headers = {name.decode("latin-1"): value for name, value in exchange.scope["headers"]}
        carrier = {name: headers.get(name, b"").decode("latin-1") for name in _CARRIED}
        with self._tracer.start_as_current_span(
            exchange.method,
            _context_of(carrier),
            SpanKind.SERVER,
            _request_attributes(exchange),
            record_exception=False,  # its text may quote what a client sent
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            finally:
                span.update_name(f"{exchange.method} {exchange.route}")
                span.set_attributes(_answer_attributes(exchange))
                if exchange.status >= _SERVER_ERROR:
                    _fail(span, str(exchange.status))

    def inferred(self, tokens: int, queue_ns: int, infer_ns: int, began_ns: int) -> None:
        """Add the spans of an inference request; `began_ns` is of `time.perf_counter_ns`."""
        began = began_ns + time.time_ns() - time.perf_counter_ns()
        self._past("queue", began - queue_ns, began)
        self._past("forward", began, began + infer_ns, {"splitlearn.tokens": tokens})

    # --- Sessions --------------------------------------------------------------------------

    @contextmanager
    def opener(self, traceparent: str | None) -> Iterator[None]:
        """Let what a block opens be in the trace that its opener names, if it names one."""
        from opentelemetry.context import attach, detach  # noqa: PLC0415 - optional

        if traceparent is None:
            yield
            return
        token = attach(_context_of({TRACEPARENT: traceparent}))
        try:
            yield
        finally:
            detach(token)

    def session_opened(self, session: Session) -> None:
        """Begin the span of a session."""
        attributes = {
            "splitlearn.model": session.model_id,
            "splitlearn.session": f"{session.id:#010x}",
        }
        self._sessions[session.id] = self._tracer.start_span("session", attributes=attributes)

    def session_ended(self, session: Session, reason: CloseReason) -> None:
        """End it."""
        span = self._sessions.pop(session.id)
        span.set_attributes(
            {
                "splitlearn.session.reason": str(reason),
                "splitlearn.session.steps": session.steps,
                "splitlearn.tokens": session.tokens,
                "splitlearn.received_bytes": session.received,
                "splitlearn.sent_bytes": session.sent,
            }
        )
        span.end()

    @contextmanager
    def step(self, session: Session, kind: str) -> Iterator[None]:
        """Let a block be the span of a step, or of another change of a session."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - optional

        before = session.tokens
        with self._tracer.start_as_current_span(
            kind.lower(),
            set_span_in_context(self._sessions[session.id]),
            attributes={"splitlearn.model": session.model_id},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                _fail(span, getattr(error, "code", type(error).__name__))
                raise
            finally:
                span.set_attribute("splitlearn.tokens", session.tokens - before)

    def turn(self, turn: Turn) -> None:
        """Add the spans of a step's queueing and forward; in the context of the step."""
        offset = time.time_ns() - int(time.monotonic() * _NS)
        queued, began, ended = (
            offset + int(moment * _NS) for moment in (turn.queued, turn.began, turn.ended)
        )
        self._past("queue", queued, began)
        self._past("forward", began, ended, {"splitlearn.batch.steps": turn.together})

    # --- Models ----------------------------------------------------------------------------

    def model_moved(self, event: TransitionEvent) -> None:
        """Begin and end the spans of loads; an observer of transitions."""
        if event.new is ModelStatus.LOADING:
            self._load(event, event.at)
        elif event.operation_id in self._loads or event.load_s is not None:
            span, _ = self._load(event, event.at - (event.load_s or 0.0))
            if event.new is ModelStatus.FAILED:
                _fail(span, event.code or "error")
            self._end_load(event.operation_id, event.at)

    def reload_failed(self, event: ReloadFailedEvent) -> None:
        """End the span of a reload; an observer of failed reloads."""
        span, _ = self._load(event, event.at)
        _fail(span, event.code or "error")
        self._end_load(event.operation_id, event.at)

    def progress(self, event: ProgressEvent) -> None:
        """Note the phase that a load has come to, as an event of its span."""
        if event.operation_id in self._over:
            return
        span, phase = self._load(event, event.at - event.elapsed_s)
        if phase != event.phase.value:
            attributes = {"splitlearn.bytes_done": event.bytes_done}
            span.add_event(event.phase.value, attributes, int(event.at * _NS))
            self._loads[event.operation_id] = span, event.phase.value

    def _load(
        self, event: TransitionEvent | ReloadFailedEvent | ProgressEvent, began: float
    ) -> tuple[Span, str]:
        """Return the span of a load, beginning it where it is heard of for the first time."""
        known = self._loads.get(event.operation_id)
        if known is None:
            attributes: dict[str, Any] = {
                "splitlearn.model": event.model_id,
                "splitlearn.generation": event.generation,
                "splitlearn.operation_id": event.operation_id,
            }
            span = self._tracer.start_span(
                "load", attributes=attributes, start_time=int(began * _NS)
            )
            known = self._loads[event.operation_id] = span, ""
        return known

    def _end_load(self, operation_id: str, at: float) -> None:
        span, _ = self._loads.pop(operation_id)
        span.end(int(at * _NS))
        self._over.append(operation_id)

    def _past(
        self, name: str, began: int, ended: int, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Add a span that is over, to the one that this code runs in."""
        span = self._tracer.start_span(name, attributes=attributes, start_time=began)
        span.end(max(began, ended))


_CARRIED = (TRACEPARENT, "tracestate")


def _context_of(carrier: Mapping[str, str]) -> Context:
    """Return the context that W3C headers name; whatever is none is left out of account."""
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - optional
        TraceContextTextMapPropagator,
    )

    return TraceContextTextMapPropagator().extract(carrier)


def _fail(span: Span, kind: str) -> None:
    """Mark a span as failed, with the kind of the error and not its text."""
    from opentelemetry.trace import StatusCode  # noqa: PLC0415 - optional

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _request_attributes(exchange: Exchange) -> dict[str, Any]:
    """Return what the conventions ask for of a request, but for what clients make up freely."""
    scope, peer, server = exchange.scope, exchange.peer, exchange.scope.get("server")
    attributes: dict[str, Any] = {
        "http.request.method": exchange.method if exchange.method != "other" else "_OTHER",
        "url.scheme": scope.get("scheme", "http"),
        "url.path": scope["path"][:_LONGEST_PATH],
        "network.protocol.version": scope.get("http_version", "1.1"),
        "splitlearn.request_id": exchange.request_id,
    }
    if peer is not None:
        attributes |= {"network.peer.address": peer[0], "network.peer.port": peer[1]}
    if server is not None and server[1] is not None:
        attributes |= {"server.address": server[0], "server.port": server[1]}
    return attributes


def _answer_attributes(exchange: Exchange) -> dict[str, Any]:
    attributes: dict[str, Any] = {"http.response.status_code": exchange.status}
    if "route" in exchange.scope:
        attributes["http.route"] = exchange.route
    if exchange.model_id is not None:
        attributes["splitlearn.model"] = exchange.model_id
    return attributes
