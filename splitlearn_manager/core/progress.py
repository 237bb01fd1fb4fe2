"""How far a load is: written by the loading thread, read by the event loop."""

from __future__ import annotations

from splitlearn_manager.core.states import LoadPhase


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
        self.phase = phase
        self.check()

    def check(self) -> None:
        """Raise what `stop` was given, if it was called."""
        if self.stopped is not None:
            raise self.stopped

    def stop(self, error: Exception) -> None:
        """Let the load end with `error` at its next report; from any thread.  The first counts."""
        if self.stopped is None:
            self.stopped = error
