"""Where the time of remote steps goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_MICROSECONDS = 1e6


@dataclass(frozen=True)
class Timings:
    """What steps have taken so far, all of them together.

    What is left of `seconds` is the wire: both ways, and what either side does with the frames.

    Attributes:
        steps: Steps that were answered.
        seconds: From when each was sent to its answer.  Steps that were sent together wait beside
            each other: the sum counts each of them.
        queue_seconds: Of these, waiting for a turn on the server.
        forward_seconds: Of these, in the forward; of a shared one, each has all of it.
            Both are 0 unless the server was asked for them (`RemoteTrunk(…, timings=True)`).
    """

    steps: int = 0
    seconds: float = 0.0
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0

    def plus(self, seconds: float, told: Mapping[str, Any]) -> Timings:
        """Return them with one step more, and what its RESULT told of it, in microseconds."""
        return Timings(
            self.steps + 1,
            self.seconds + seconds,
            self.queue_seconds + _microseconds(told, "queue_us"),
            self.forward_seconds + _microseconds(told, "forward_us"),
        )


def _microseconds(told: Mapping[str, Any], name: str) -> float:
    """Return a time in seconds; 0 where it is not told, or makes no sense."""
    value = told.get(name, 0)
    return value / _MICROSECONDS if isinstance(value, int) and value > 0 else 0.0
