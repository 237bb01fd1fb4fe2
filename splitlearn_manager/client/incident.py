"""What was tried in order to go on, and whether to try again."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from splitlearn_manager.client.errors import RemoteSessionClosed, RemoteUnavailable, Tried

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from splitlearn_manager.client.replicas import Replica
    from splitlearn_manager.config.retry import RetryPolicy

_FINAL = frozenset({"client_limit", "certificate", "closed"})
"""Codes of what can't be had at an address, however often it is asked there."""


class Incident:
    """The addresses that were tried since sessions were lost, within a policy's budget.

    Args:
        policy: The budget.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._begin: float | None = None
        self._attempts: dict[Replica, int] = {}
        self._reasons: dict[Replica, str] = {}
        self._refused: set[Replica] = set()
        self._not_before: dict[Replica, float] = {}

    def note(self, replica: Replica, errors: Iterable[Exception]) -> None:
        """Take down an attempt that failed."""
        self._begin = monotonic() if self._begin is None else self._begin
        self._attempts[replica] = self._attempts.get(replica, 0) + 1
        for error in errors:
            self._reasons[replica] = str(error)
            if is_final(error):
                self._refused.add(replica)
                return
            wait = getattr(error, "retry_after", None)
            if wait is not None:
                self._not_before[replica] = monotonic() + wait

    def due(self, replicas: Iterable[Replica]) -> Iterator[Replica]:
        """Yield those that may be tried now."""
        for replica in replicas:
            if self._is_left(replica) and self._wait(replica) <= 0:
                yield replica

    def pause(self, rounds: int, replicas: Iterable[Replica]) -> float | None:
        """Return the seconds until the next round, after so many; `None`: there is none."""
        waits = [self._wait(replica) for replica in replicas if self._is_left(replica)]
        left = self._policy.total - self.seconds
        if not waits or min(waits) > left or left <= 0:
            return None
        return min(max(self._policy.pause(rounds), min(waits)), left)

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return 0.0 if self._begin is None else monotonic() - self._begin

    @property
    def limits(self) -> str:
        """How long it may go on, in words."""
        policy = self._policy
        return f"for up to {policy.total:g} s and {policy.attempts} attempts at each address"

    @property
    def tried(self) -> tuple[Tried, ...]:
        """What was tried, and why it failed."""
        return tuple(
            Tried(str(replica.address), attempts, self._reasons[replica])
            for replica, attempts in self._attempts.items()
        )

    def _is_left(self, replica: Replica) -> bool:
        return (
            replica not in self._refused and self._attempts.get(replica, 0) < self._policy.attempts
        )

    def _wait(self, replica: Replica) -> float:
        """Return the seconds that a server wants to be left alone for."""
        return self._not_before.get(replica, 0.0) - monotonic()


def is_final(error: Exception) -> bool:
    """Whether the same address would answer the same again."""
    if isinstance(error, RemoteUnavailable):
        return error.code in _FINAL
    return not isinstance(error, RemoteSessionClosed)
