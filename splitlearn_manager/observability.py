"""What operators see: Prometheus metrics, and logs as text or as one JSON object per line.

Names are `splitlearn_<noun>_<unit>`, in seconds and bytes; labels have few values: ids of models,
routes, states, codes, and never anything that a client made up.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.series import PerModel, UsageCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from splitlearn_manager.core.events import ReloadFailedEvent, TransitionEvent
    from splitlearn_manager.core.model_info import ModelInfo
    from splitlearn_manager.core.resources import ResourceUsage
    from splitlearn_manager.serving.usage import ModelUsage

LogFormat = Literal["text", "json"]

ACCESS_LOG = "splitlearn.access"
"""The logger that has a line for each request and session."""

LOAD_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800)
AGE_BUCKETS = (1, 10, 60, 300, 1800, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600)
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)


class Metrics:
    """The metrics of one daemon, in a registry of their own.

    What happens is counted when it happens; what *is* (states, memory, sessions) is looked up when
    somebody asks, or set from snapshots then, by `observe_models` and `observe_memory`.

    The series of a model that is gone are shown once more after it went, and then no longer.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._per_model: list[PerModel[Any]] = []
        self._gone: set[str] = set()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        build = Info("splitlearn_build", "Version of the daemon", registry=self.registry)
        build.info({"version": version(), "python": platform.python_version()})
        self._define_models()
        self._define_memory()
        self._define_sessions()
        self._define_forwards()
        self._define_inference()
        self._define_generation()
        self._define_requests()
        self._usage = UsageCollector(self._models_with_series)
        self.registry.register(self._usage)

    def _define_models(self) -> None:
        self._state = self._gauge("model_state", "1 for the state of a model", "model", "state")
        self._load_seconds = self._histogram(
            "model_load_duration_seconds", "Loads that ended well", LOAD_BUCKETS
        )
        self._queue_seconds = self._histogram(
            "model_load_queue_seconds", "Their waits for a worker and for memory", LOAD_BUCKETS
        )
        self._load_failures = self._counter(
            "model_load_failures_total", "Loads and reloads that failed", "reason"
        )
        self._loading = self._gauge("model_loads_in_progress", "Loads and reloads under way")
        self._unload_seconds = self._histogram(
            "model_unload_duration_seconds", "Unloads, the drain included", LOAD_BUCKETS
        )
        self._evictions = self._counter(
            "model_evictions_total", "Models that went because nobody used them", "reason"
        )
        self._eviction_age = self._histogram(
            "model_age_at_eviction_seconds", "How long these had been ready", AGE_BUCKETS
        )
        self._size = self._gauge("model_size_bytes", "Size of a model's weights", "model", "kind")
        self._caches = self._gauge(
            "model_kv_cache_bytes", "KV caches of a model's sessions", "model", "kind"
        )

    def _define_memory(self) -> None:
        self._capacity = self._gauge("memory_capacity_bytes", "Most to be reserved", "device")
        self._reserved = self._gauge(
            "memory_reserved_bytes", "Reserved for models and caches of sessions", "device"
        )
        self._used = self._gauge("memory_used_bytes", "Measured of loaded models", "device")
        self._cache_budget = self._gauge(
            "cache_budget_bytes", "What models leave for caches of sessions, in all", "device"
        )

    def _define_sessions(self) -> None:
        self._opened = self._model_counter("sessions_opened_total", "Sessions that were opened")
        self._ended = self._model_counter(
            "sessions_ended_total", "Sessions that have ended", "reason"
        )
        self._steps = self._model_counter("session_steps_total", "Steps, by outcome", "code")
        self._step_seconds = self._model_histogram(
            "session_step_duration_seconds", "Steps, waiting included", STEP_BUCKETS
        )
        self._tokens = self._model_counter(
            "session_tokens_total", "Positions computed, times rows", "phase"
        )

    def _define_forwards(self) -> None:
        self._rows = self._model_histogram("session_batch_rows", "Rows of a forward", BATCH_BUCKETS)
        self._forward_seconds = self._model_histogram(
            "session_forward_duration_seconds", "Forwards of sessions", STEP_BUCKETS
        )
        self._step_queue_seconds = self._model_histogram(
            "session_step_queue_seconds", "Until a step had its turn", STEP_BUCKETS
        )

    def _define_inference(self) -> None:
        self._inferences = self._model_counter(
            "infer_requests_total", "Inference requests, by outcome", "code"
        )
        self._infer_tokens = self._model_counter(
            "infer_tokens_total", "Positions of inference requests that succeeded, times rows"
        )
        self._infer_seconds = self._model_histogram(
            "infer_duration_seconds", "Those that succeeded, to the answer", REQUEST_BUCKETS
        )
        self._infer_queue_seconds = self._model_histogram(
            "infer_queue_seconds", "Their waits for the model's thread", STEP_BUCKETS
        )
        self._infer_forward_seconds = self._model_histogram(
            "infer_forward_duration_seconds", "Their forwards", STEP_BUCKETS
        )

    def _define_generation(self) -> None:
        self._generations = self._model_counter(
            "generation_requests_total", "Requests for text, by outcome", "code"
        )
        self._generation_queue_seconds = self._model_histogram(
            "generation_queue_seconds", "Until a prompt was let in", STEP_BUCKETS
        )
        self._generation_first_seconds = self._model_histogram(
            "generation_time_to_first_token_seconds", "Until a request had one", REQUEST_BUCKETS
        )
        self._generation_rows = self._model_histogram(
            "generation_batch_rows", "Answers that shared a forward", BATCH_BUCKETS
        )
        self._generation_step_seconds = self._model_histogram(
            "generation_step_duration_seconds", "A token for each answer", STEP_BUCKETS
        )
        self._generation_tokens = self._model_counter(
            "generation_tokens_total", "Tokens of prompts, and of answers", "kind"
        )

    def _define_requests(self) -> None:
        self._received = self._model_counter(
            "received_bytes_total", "Frames of sessions, bodies of inference requests", "protocol"
        )
        self._sent = self._model_counter(
            "sent_bytes_total", "Frames of sessions, bodies of answers", "protocol"
        )
        labels = ("route", "method", "code")
        self._requests = self._counter("requests_total", "HTTP requests", *labels)
        self._request_seconds = self._histogram(
            "request_duration_seconds", "HTTP requests", REQUEST_BUCKETS, "route"
        )
        self._in_flight = self._gauge("requests_in_flight", "HTTP requests being answered")
        self._loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late a timer of the event loop was", LAG_BUCKETS
        )

    def _model_counter(self, name: str, text: str, *labels: str) -> PerModel[Counter]:
        return self._of_models(PerModel(self._counter(name, text, "model", *labels)))

    def _model_histogram(
        self, name: str, text: str, buckets: tuple[float, ...]
    ) -> PerModel[Histogram]:
        return self._of_models(PerModel(self._histogram(name, text, buckets, "model")))

    def _of_models(self, metric: PerModel[Any]) -> PerModel[Any]:
        self._per_model.append(metric)
        return metric

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"splitlearn_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"splitlearn_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"splitlearn_{name}", text, labels, buckets=buckets, registry=self.registry
        )

    def model_moved(self, event: TransitionEvent) -> None:
        """Count the end of a load, a reload or an unload; an observer of transitions."""
        if event.new is ModelStatus.FAILED:
            self._load_failures.labels(event.code or "error").inc()
        elif event.new is ModelStatus.READY:
            self._load_seconds.observe(event.load_s or 0.0)
            self._queue_seconds.observe(event.queued_s or 0.0)
        elif event.new is ModelStatus.UNLOADING and event.code:
            self._evictions.labels(event.code).inc()
            self._eviction_age.observe(event.duration_s)
        elif event.old is ModelStatus.UNLOADING:
            self._unload_seconds.observe(event.duration_s)

    def reload_failed(self, event: ReloadFailedEvent) -> None:
        """Count a reload that failed; an observer of failed reloads."""
        self._load_failures.labels(event.code or "error").inc()

    def loop_lag(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self._loop_lag.observe(seconds)

    def request_began(self, change: int) -> None:
        """Count an HTTP request that has begun (1) or ended (-1)."""
        self._in_flight.inc(change)

    def follow_sessions(self, usage: Callable[[], Mapping[str, ModelUsage]]) -> None:
        """Show what sessions take; asked when the metrics are, in any thread."""
        self._usage.usage = usage

    def follow_requests(self, taken: Callable[[str], int]) -> None:
        """Show how many inference requests a model has; likewise."""
        self._usage.requests = taken

    def follow_generation(self, usage: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """Show how many prompts of each model are being answered, and wait; likewise."""
        self._usage.generation = usage

    def generation_request(self, model_id: str, code: str) -> None:
        """Count a request for text: `ok`, `cancelled` by its client, or an error's code."""
        self._generations(model_id, code).inc()

    def generation_queued(self, model_id: str, seconds: float) -> None:
        """Note how long a prompt waited to be let in."""
        self._generation_queue_seconds(model_id).observe(seconds)

    def generation_first_token(self, model_id: str, seconds: float) -> None:
        """Note when a request had its first token."""
        self._generation_first_seconds(model_id).observe(seconds)

    def generation_forward(self, model_id: str, rows: int, seconds: float) -> None:
        """Count a forward that gave each of so many answers a token, and how long it took."""
        self._generation_rows(model_id).observe(rows)
        self._generation_step_seconds(model_id).observe(seconds)

    def generation_tokens(self, model_id: str, kind: str, count: int) -> None:
        """Count tokens: of prompts that were let in (`prompt`), or `generated`."""
        self._generation_tokens(model_id, kind).inc(count)

    def session_opened(self, model_id: str) -> None:
        """Count a session that was opened."""
        self._opened(model_id).inc()

    def session_ended(self, model_id: str, reason: str) -> None:
        """Count a session that has ended, and why."""
        self._ended(model_id, reason).inc()

    def session_step(
        self, model_id: str, code: str, seconds: float, tokens: int, phase: str
    ) -> None:
        """Count a step.

        Args:
            model_id: Whose.
            code: Its outcome: `ok` or an error's code.
            seconds: How long it took.
            tokens: Positions that it computed, times rows.
            phase: Of what these were: `prefill` or `decode`.
        """
        self._steps(model_id, code).inc()
        self._step_seconds(model_id).observe(seconds)
        self._tokens(model_id, phase).inc(tokens)

    def forward(self, model_id: str, rows: int, seconds: float) -> None:
        """Count a forward that sessions shared, or had alone: its rows, and how long it took."""
        self._rows(model_id).observe(rows)
        self._forward_seconds(model_id).observe(seconds)

    def step_queued(self, model_id: str, seconds: float) -> None:
        """Note how long a step waited for its turn."""
        self._step_queue_seconds(model_id).observe(seconds)

    def received(self, model_id: str, protocol: str, nbytes: int) -> None:
        """Count bytes that came for a model: of `sessions`, or `infer`."""
        self._received(model_id, protocol).inc(nbytes)

    def sent(self, model_id: str, protocol: str, nbytes: int) -> None:
        """Count bytes that went back; likewise."""
        self._sent(model_id, protocol).inc(nbytes)

    def request(self, route: str, method: str, code: int, seconds: float) -> None:
        """Count an HTTP request by the route that took it, never by its path."""
        self._requests.labels(route, method, str(code)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def inference(self, model_id: str, code: str) -> None:
        """Count an inference request: `ok`, `cancelled` by its client, or an error's code."""
        self._inferences(model_id, code).inc()

    def inferred(
        self, model_id: str, tokens: int, seconds: float, queue: float, run: float
    ) -> None:
        """Note of an inference request that succeeded its positions, and how long it took.

        Args:
            model_id: Whose.
            tokens: Positions, times rows.
            seconds: From the request's head to its answer.
            queue: What of it was waiting for the model's thread.
            run: What of it was the forward.
        """
        self._infer_tokens(model_id).inc(tokens)
        self._infer_seconds(model_id).observe(seconds)
        self._infer_queue_seconds(model_id).observe(queue)
        self._infer_forward_seconds(model_id).observe(run)

    def observe_models(self, models: Iterable[ModelInfo]) -> None:
        """Set states and sizes of the models that there are now; those of others disappear."""
        models = list(models)
        self._state.clear()
        self._size.clear()
        self._caches.clear()
        for model in models:
            for status in ModelStatus:
                self._state.labels(model.model_id, status.value).set(status is model.status)
            self._size.labels(model.model_id, "predicted").set(model.predicted_bytes)
            self._size.labels(model.model_id, "actual").set(model.resident_bytes)
            self._caches.labels(model.model_id, "used").set(model.kv_cache_bytes)
            if model.kv_cache_budget is not None:
                self._caches.labels(model.model_id, "budget").set(model.kv_cache_budget)
        loading = sum(m.status is ModelStatus.LOADING or m.reloading for m in models)
        self._loading.set(loading)
        self._forget_gone({model.model_id for model in models})

    def _models_with_series(self) -> set[str]:
        return set().union(*(metric.models() for metric in self._per_model))

    def _forget_gone(self, present: set[str]) -> None:
        """Drop the series of models that were gone the last time already."""
        gone = self._models_with_series() - present
        for model_id in gone & self._gone:
            for metric in self._per_model:
                metric.forget(model_id)
        self._gone = gone - self._gone

    def observe_memory(self, usage: ResourceUsage, used: int = 0, caches: int = 0) -> None:
        """Set what a device has, what of it is promised, and what of that was measured.

        Args:
            usage: What it has, and has promised.
            used: Bytes that the models on it take, measured.
            caches: What of the promised bytes is for caches of sessions.
        """
        self._capacity.labels(usage.device).set(usage.capacity_bytes)
        self._reserved.labels(usage.device).set(usage.reserved_bytes)
        self._used.labels(usage.device).set(used)
        budget = max(0, usage.capacity_bytes - usage.reserved_bytes + caches)
        self._cache_budget.labels(usage.device).set(budget)

    def render(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)


def version() -> str:
    """Return the version of the installed distribution."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("splitlearn")
    return "unknown"


CURRENT_REQUEST: ContextVar[str] = ContextVar("request_id")
"""The request that the code in this context works for; what it starts is done for it, too."""


class RequestIdFilter(logging.Filter):
    """Gives records the id of the request that they come from, as `request_id`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        request_id = CURRENT_REQUEST.get("")
        if request_id and not hasattr(record, "request_id"):
            record.request_id = request_id
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ts (UTC), level, logger, message, and what `extra` held."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
        "message",
        "asctime",
        "taskName",
        "color_message",  # uvicorn's own, with escape codes
    }

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        if record.exc_info:
            extra["exception"] = self.formatException(record.exc_info)
        return json.dumps(extra | entry, default=str)


class _TextFormatter(logging.Formatter):
    """Time, level and logger before the message; behind it the ids to look for others by."""

    _IDS = ("operation_id", "request_id")

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, without a traceback."""
        ids = [f"{name}={getattr(record, name)}" for name in self._IDS if hasattr(record, name)]
        line = super().formatMessage(record)
        return f"{line} [{' '.join(ids)}]" if ids else line


def configure_logging(
    level: str,
    format: LogFormat = "text",  # noqa: A002 - as in YAML
    *,
    access_log: bool = False,
) -> None:
    """Let the process log to stderr; for whoever owns the process, never for a library.

    Args:
        level: `debug`, `info`, `warning`, `error` or `critical`.
        format: `text` for people, `json` for one object per line.
        access_log: Whether the access log is written, at whatever level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(JsonFormatter() if format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # What it has to say below shows what clients sent: queries, and at `debug` every header.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, root.level))
    logging.getLogger(ACCESS_LOG).setLevel(logging.INFO if access_log else logging.NOTSET)
