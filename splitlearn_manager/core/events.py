"""What happens to models, for whoever watches: logs, metrics and event streams."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from splitlearn_manager.core.states import ModelStatus, state_name

if TYPE_CHECKING:
    from splitlearn_manager.core.states import LoadPhase, State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransitionEvent:
    """One move in the life of a model.

    Attributes:
        model_id: Whose.
        generation: Number of the load that made this entry; each load has a higher one.
        old: State before; `None` is absent.
        new: State after; `None` is absent.
        reason: Why, in words.
        duration_s: Seconds spent in the state before (monotonic clock); 0.0 if it was absent.
        at: When, in seconds since the epoch.
        operation_id: The load, reload or unload that this is a step of.
        code: A word for programs, where it is a failure or an eviction: `fetch_failed`, `evicted`.
        unreturned_bytes: At the end of an unload, what of its memory is not back.
        load_s: At the end of a load or reload, the seconds since it was asked for.
        queued_s: Likewise, how many of them it was queued or waited for memory.
    """

    model_id: str
    generation: int
    old: State
    new: State
    reason: str
    duration_s: float
    at: float
    operation_id: str = ""
    code: str = ""
    unreturned_bytes: int = 0
    load_s: float | None = None
    queued_s: float | None = None


@dataclass(frozen=True)
class ProgressEvent:
    """How far a load is; at most a few of them a second.

    Attributes:
        model_id: Whose.
        generation: Number of the load.
        operation_id: The load, or reload.
        phase: What it is at.
        bytes_done: Bytes of weights that are in.
        bytes_total: Bytes of weights in all; 0 while not known.
        elapsed_s: Seconds since it was asked for.
        bytes_per_second: How fast they come, over the last seconds; `None` while not known.
        seconds_left: How long it will take at that rate; `None` while not known.
        at: When, in seconds since the epoch.
    """

    model_id: str
    generation: int
    operation_id: str
    phase: LoadPhase
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    bytes_per_second: float | None
    seconds_left: float | None
    at: float


@dataclass(frozen=True)
class ReloadFailedEvent:
    """A reload failed: the model stays as it was, loaded.

    Attributes:
        model_id: Whose.
        generation: Number of the load that failed.
        operation_id: The reload.
        reason: Why, in words.
        code: Why, in a word for programs.
        at: When, in seconds since the epoch.
    """

    model_id: str
    generation: int
    operation_id: str
    reason: str
    code: str
    at: float


@dataclass(frozen=True)
class EventsLostEvent:
    """A reader was too slow, or away: so many events, at this place, are not in its stream.

    Attributes:
        count: How many; `None` where nobody knows, as after another start of the daemon.
        at: When the first of them happened, as near as that is known, in seconds since the epoch.
    """

    count: int | None
    at: float


Event = TransitionEvent | ProgressEvent | ReloadFailedEvent | EventsLostEvent

TransitionObserver = Callable[[TransitionEvent], None]
"""Called on the event loop's thread, right after the move; must not block."""

FailedReloadObserver = Callable[[ReloadFailedEvent], None]
"""Likewise, when a reload has failed."""


def log_transition(event: TransitionEvent) -> None:
    """Log a move as one line, with the event's fields as the record's `extra`."""
    level = logging.WARNING if event.new is ModelStatus.FAILED else logging.INFO
    fields = asdict(event) | {"old": state_name(event.old), "new": state_name(event.new)}
    logger.log(
        level,
        "model %s #%d: %s -> %s after %.3f s (%s)",
        event.model_id,
        event.generation,
        fields["old"],
        fields["new"],
        event.duration_s,
        event.reason,
        extra={"event": "model_transition", **fields},
    )


def log_failed_reload(event: ReloadFailedEvent) -> None:
    """Log a reload that failed as one line, with the event's fields as the record's `extra`."""
    logger.warning(
        "model %s stays as it was: reload #%d failed (%s)",
        event.model_id,
        event.generation,
        event.reason,
        extra={"event": "model_reload_failed", **asdict(event)},
    )
