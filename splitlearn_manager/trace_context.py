"""The span that code runs in, as it goes to other processes and threads.

For clients: a process that has not imported OpenTelemetry has no spans, and imports none here.
What makes spans is in `splitlearn_manager.tracing`.
"""

from __future__ import annotations

import sys
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

TRACEPARENT = "traceparent"


def trace_headers() -> dict[str, str]:
    """Return the W3C headers of the span that this code runs in; none where there is none."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - optional
        TraceContextTextMapPropagator,
    )

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier


def in_context(fn: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs in today's span when another thread calls it, once."""
    if "opentelemetry.trace" not in sys.modules:
        return fn
    return partial(copy_context().run, fn)
