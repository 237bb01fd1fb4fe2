"""Asking again after a failure that may pass: how often, and after how long."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from splitlearn_core.errors import FetchError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TransientError(Exception):
    """A failure that may pass: overload, a dropped connection.

    Attributes:
        after: Seconds after which the server wants to be asked again, where it says so.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Patience:
    """When to ask again, and when to give up.

    Attributes:
        attempts: Failures in a row, nothing fetched between them, after which to give up.
        first: Seconds before the first repetition; each further wait is twice as long, …
        longest: … up to this, which also bounds what a server's `Retry-After` can ask for.
        wait: How to wait: for an event that ends the fetching, or the seconds.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 60.0
    wait: Callable[[Event, float], object] = Event.wait

    def delay(self, failures: int, after: float | None) -> float:
        """Return the seconds to wait after that many failures in a row."""
        if after is not None:
            return min(after, self.longest)
        backoff = min(self.first * 2.0 ** (failures - 1), self.longest)
        # jitter, so that many clients of an overloaded server don't come back all at once
        return backoff * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class Retries:
    """The failures of one piece of work."""

    def __init__(self, patience: Patience, what: str, stop: Event | None = None) -> None:
        self._patience = patience
        self._what = what
        self._stop = stop or Event()
        self._failures = 0

    def progressed(self) -> None:
        """Something came: failures before it no longer count."""
        self._failures = 0

    def failed(self, error: TransientError) -> None:
        """Wait before the next attempt.

        Raises:
            FetchError: There have been too many failures.
        """
        self._failures += 1
        if self._failures >= self._patience.attempts:
            raise FetchError(
                f"{self._what} can't be fetched: {error}; given up after {self._failures} attempts."
                "  What is fetched so far is kept for the next start"
            ) from error
        delay = self._patience.delay(self._failures, error.after)
        logger.warning("%s: %s; trying again in %.1f s", self._what, error, delay)
        self._patience.wait(self._stop, delay)


def patiently(action: Callable[[], T], what: str, patience: Patience) -> T:
    """Return what `action` returns, repeating it after a `TransientError`."""
    retries = Retries(patience, what)
    while True:
        try:
            return action()
        except TransientError as error:
            retries.failed(error)
