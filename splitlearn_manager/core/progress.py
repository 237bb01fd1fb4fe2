"""How far a load is: written by the loading thread, read by the event loop."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from splitlearn_manager.core.states import LoadPhase

if TYPE_CHECKING:
    from splitlearn_core.loading.stages import LoadStage

_INSTANT = 1e-6
"""Seconds: what lies closer together says nothing of a rate."""

_WAITING = frozenset({LoadPhase.QUEUED, LoadPhase.WAITING_FOR_MEMORY})


class LoadProgress:
    """Phase and bytes of one load, and the way to ask it to stop.

    Needs no lock: there is one writer at a time (the thread that the load is at), and each
    attribute is replaced whole by one assignment, so that a reader sees the value before or the
    one after.  It may see `bytes_done` of one moment beside `bytes_total` of the next, which is
    good enough to show.

    A thread can't be ended from outside; `stop` asks it to, and the thread finds out at its next
    report, between two tensors.

    Attributes:
        phase: What the load is at.
        bytes_done: Bytes of weights that are in.
        bytes_total: Bytes of weights in all; 0 while not known.
        stopped: What the load is to end with; `None` while nobody asked it to.
    """

    def __init__(self) -> None:
        self.phase = LoadPhase.QUEUED
        self.bytes_done = 0
        self.bytes_total = 0
        self.stopped: Exception | None = None
        self._entered = time.monotonic()
        self._waited = 0.0

    def __call__(self, bytes_done: int, bytes_total: int) -> None:
        """Report bytes; from the loading thread.

        Raises:
            Exception: What `stop` was given.
        """
        self.bytes_done = bytes_done
        self.bytes_total = bytes_total
        self.check()

    def enter(self, phase: LoadPhase) -> None:
        """Report a phase; from the loading thread.

        Raises:
            Exception: What `stop` was given.
        """
        self._waited, self._entered = self.waited_s, time.monotonic()
        self.phase = phase
        self.check()

    def enter_stage(self, stage: LoadStage) -> None:
        """Report what brings the bytes: the phase of the same name; from the loading thread.

        Raises:
            Exception: What `stop` was given.
        """
        self.enter(LoadPhase(stage.value))

    @property
    def waited_s(self) -> float:
        """Seconds that the load was queued, or waited for memory, so far."""
        waits = self.phase in _WAITING
        return self._waited + (time.monotonic() - self._entered if waits else 0.0)

    def check(self) -> None:
        """Raise what `stop` was given, if it was called."""
        if self.stopped is not None:
            raise self.stopped

    def mark(self) -> tuple[LoadPhase, int, int]:
        """Return what differs whenever the load has moved."""
        return self.phase, self.bytes_done, self.bytes_total

    def stop(self, error: Exception) -> None:
        """Let the load end with `error` at its next report; from any thread.  The first counts."""
        if self.stopped is None:
            self.stopped = error


class Pace:
    """How fast bytes come, from samples that the event loop takes; pure.

    Args:
        span: Seconds back that the rate looks.
    """

    def __init__(self, span: float = 10.0) -> None:
        self._span = span
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now: float, nbytes: int) -> None:
        """Note how many bytes are in."""
        if self._samples and nbytes < self._samples[-1][1]:
            self._samples.clear()  # another file, or another attempt
        self._samples.append((now, nbytes))
        while self._samples[0][0] < now - self._span:
            self._samples.popleft()

    def rate(self) -> float | None:
        """Return bytes per second; `None` while there is too little to say it from."""
        if len(self._samples) < 2:  # noqa: PLR2004 - a difference needs two
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end - start >= _INSTANT else None

    def seconds_left(self, nbytes: int) -> float | None:
        """Return how long so many bytes will take; `None` while nothing comes."""
        rate = self.rate()
        return nbytes / rate if rate else None
