"""A daemon's events, for as long as somebody watches: also while daemon or connection come and go.

A stream that ended is opened again where it was (`Last-Event-ID`).  A daemon that is still the same
goes on after the last event; one that was started anew, or does not have what came since any more,
says that events were lost and gives the states of all models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from splitlearn_core.loading.retries import Patience
from splitlearn_manager.client.errors import RemoteUnavailable
from splitlearn_manager.client.management import DaemonEvent, ManagementClient

AWAY = 300.0
"""Seconds that a daemon may stay away."""

PAUSES = Patience(first=0.5, longest=15.0)
"""How long to wait before each attempt: twice as long each time, and less than that by chance."""

_MOST_DOUBLINGS = 32


class Watch:
    """Watches one daemon.

    Args:
        client: Who asks it.
        model_id: The model to watch alone, if not all.
        away: Seconds that the daemon may stay away; with 0 the end of the stream is the end.
        tell: Is told, in a line, when the daemon is away, and when it is back.
        wait: Waits for so many seconds.
        clock: The seconds now.
    """

    def __init__(
        self,
        client: ManagementClient,
        model_id: str | None = None,
        *,
        away: float = AWAY,
        tell: Callable[[str], object] = lambda _: None,
        wait: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not away >= 0:  # nor no number at all
            raise ValueError(f"a daemon may stay away for 0 seconds or more, found {away}")
        self._client = client
        self._model_id = model_id
        self._away = away
        self._tell = tell
        self._wait = wait
        self._clock = clock
        self._position: str | None = None
        self._connected: float | None = None  # since when, the last time
        self._lost: float | None = None  # since when, if it is
        self._failures = 0

    def events(self) -> Iterator[DaemonEvent]:
        """Yield events until the daemon has stayed away for too long.

        Raises:
            RemoteError: It refuses, at the beginning or when it is back.
            RemoteUnavailable: It can't be reached at the beginning, or stayed away.
        """
        while True:
            try:
                with self._client.events(self._model_id, self._position) as events:
                    self._is_there()
                    for event in events:
                        self._position = event.position or self._position
                        yield event
                if not self._away:
                    return
                self._is_away(RemoteUnavailable(f"{self._client.address} ended its events"))
            except RemoteUnavailable as error:
                if self._connected is None or not self._away:
                    raise
                self._is_away(error)

    def _is_there(self) -> None:
        """Note that there is a connection."""
        if self._lost is not None:
            self._tell(f"connected to {self._client.address} again")
        self._connected, self._lost = self._clock(), None

    def _is_away(self, error: RemoteUnavailable) -> None:
        """Wait before the next attempt.

        Raises:
            RemoteUnavailable: The daemon has been away for too long.
        """
        now = self._clock()
        if self._lost is None:
            self._lost = now
            self._tell(f"{error}; trying again for {self._away:g} s")
            if now - (self._connected or now) > PAUSES.longest:
                self._failures = 0  # a connection that lasted; one that ended at once is no success
        left = self._lost + self._away - now
        if left <= 0:
            raise RemoteUnavailable(f"{error}; given up after {self._away:g} s") from error
        self._failures += 1
        self._wait(min(PAUSES.delay(min(self._failures, _MOST_DOUBLINGS), None), left))
