"""How long, and how often, a client tries to go on when a server does not."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from splitlearn_manager.config.fields import Seconds
from splitlearn_manager.config.section import build, found, section
from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY_LIMIT = 256 * 1024 * 1024
"""Bytes of steps that a client keeps for a session, to send them again, unless told otherwise."""

_MOST_DOUBLINGS = 60
"""By then any pause is longer than the longest; a float has room for it, and not for any number."""


@section
class RetryPolicy:
    """When what failed is tried again: exponential back-off with full jitter, within a budget.

    Source of the formula: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog.

    Attributes:
        attempts: How often each address is tried.
        base: Seconds that the pause after the first round of addresses is below; doubled with
            each further round, …
        maximum: … up to this.
        total: Seconds after which no attempt begins any more.
    """

    attempts: int = 20
    base: Seconds = 0.2
    maximum: Seconds = 5.0
    total: Seconds = 60.0

    def __post_init__(self) -> None:
        """Check what the types don't say."""
        if self.attempts < 1:
            message = f"must be 1 or more, {found(self.attempts)}"
            raise ConfigError(Problem(message, ("attempts",)))

    def longest(self, rounds: int) -> float:
        """Return the seconds that the pause after so many failed rounds is below."""
        return min(self.maximum, self.base * 2.0 ** min(rounds - 1, _MOST_DOUBLINGS))

    def pause(self, rounds: int, draw: Callable[[float, float], float] = random.uniform) -> float:
        """Return the seconds to wait after so many failed rounds, 1 or more.

        Args:
            rounds: How often every address was tried.
            draw: Returns a number between two, each as likely as any other: clients that lost the
                same server don't all come back at once.
        """
        return draw(0.0, self.longest(rounds))


def _policy(value: Any) -> Any:
    """Return a policy, checked as the section it is."""
    return value if isinstance(value, RetryPolicy) else build(RetryPolicy, value)


Retry = Annotated[RetryPolicy, BeforeValidator(_policy)]
