"""How long a load may take: by whether it moves, and by its size, never by one constant.

A constant is too long for what hangs and too short for what is large.  So a load ends when nothing
about it has changed for a while, and when it takes longer in all than its size can explain.
Time spent in a queue, or waiting for memory, does not count: that is others' time.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class LoadDeadlines:
    """When a load is given up.

    Attributes:
        stall: Seconds without any progress: no byte, no new phase.
        base: Seconds that any load may take, however small, …
        per_gib: … and how many more for each GiB of weights.
    """

    stall: float = 300.0
    base: float = 600.0
    per_gib: float = 120.0

    def total(self, nbytes: int) -> float:
        """Return the seconds that a load of so many bytes may take in all."""
        return self.base + self.per_gib * nbytes / GIB


class LoadClock:
    """Watches one attempt of a load against its deadlines; pure, the time is the caller's.

    Args:
        deadlines: What to hold it to.
        now: Monotonic seconds at its start.
    """

    def __init__(self, deadlines: LoadDeadlines, now: float) -> None:
        self._deadlines = deadlines
        self._started = now
        self._moved = now
        self._mark: object = None

    def pause(self, now: float) -> None:
        """Begin anew: so far, it waited for its turn."""
        self._started = self._moved = now

    def overdue(self, mark: object, nbytes: int, now: float) -> str | None:
        """Return why the load is to be given up now, or `None`.

        Args:
            mark: Anything that differs when the load has moved.
            nbytes: Its size, as far as known.
            now: Monotonic seconds.
        """
        if mark != self._mark:
            self._mark, self._moved = mark, now
        if now - self._moved >= self._deadlines.stall:
            return f"made no progress for {self._deadlines.stall:g} s"
        limit = self._deadlines.total(nbytes)
        if now - self._started >= limit:
            return f"was not done after {limit:g} s, which is the limit for {nbytes} bytes"
        return None
