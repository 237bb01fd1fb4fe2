"""Which failures of a load may heal by themselves, and when to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass

HEALING = (ConnectionError, TimeoutError)
"""A hub or a network that does not answer.  Anything else (a damaged file, a wrong configuration,
no memory) is as wrong the next time, until somebody mends it."""


_MOST_DOUBLINGS = 60
"""By then any wait is longer than the longest; a float has room for it, and not for any number."""


@dataclass(frozen=True)
class RetryPolicy:
    """When a load is tried again.

    Attributes:
        attempts: How often in all.
        first: Seconds before the second attempt; each further wait is four times as long, …
        longest: … up to this.
    """

    attempts: int = 3
    first: float = 5.0
    longest: float = 300.0

    def delay(self, failures: int, error: BaseException) -> float | None:
        """Return the seconds to wait after so many failed attempts; `None` to give up."""
        if failures >= self.attempts or not may_heal(error):
            return None
        # jitter, so that what failed together is not tried together
        return self.pause(failures) * random.uniform(0.75, 1.0)  # noqa: S311 - no secret

    def pause(self, failures: int) -> float:
        """Return the seconds that are long enough after so many failures."""
        doublings = min(2 * (failures - 1), _MOST_DOUBLINGS)
        return min(self.first * 2.0**doublings, self.longest)


def may_heal(error: BaseException) -> bool:
    """Whether the same load may succeed later, with nothing changed by anybody."""
    return isinstance(error, HEALING) and not getattr(error, "final", False)
