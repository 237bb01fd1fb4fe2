"""What happens to models, for whoever watches: logs now, metrics and event streams besides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from splitlearn_manager.core.states import ModelStatus, state_name

if TYPE_CHECKING:
    from splitlearn_manager.core.states import State

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
    """

    model_id: str
    generation: int
    old: State
    new: State
    reason: str
    duration_s: float
    at: float


TransitionObserver = Callable[[TransitionEvent], None]
"""Called on the event loop's thread, right after the move; must not block."""


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
