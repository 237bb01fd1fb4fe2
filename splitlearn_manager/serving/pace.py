"""How long the turns of a model's sessions are: for whom to wait, and how much of a prompt to run.

Pure bookkeeping of what the last forwards were and took; the batcher, which runs them, tells it.

Those who step and those who wait for their first token have a claim to the model both.  While a
long prompt runs beside steps, a piece of it takes at most `LONG_SHARE` of a forward of the steps,
so that a step takes less than three times as long as usual, however long that goes on.  A prompt
that fits into one chunk is soon done, and small pieces cost more than large ones: its pieces take
more, and where several such prompts wait, each runs in one piece, so that forwards of steps soon
have all their rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SHORTEST_PIECE = 8
"""Positions; a shorter piece would cost as much time."""

LONG_SHARE = 1.6
SHORT_SHARE = 4.0
"""Seconds of a piece of a prompt for each second of a forward of steps: of prompts that are longer
than a chunk, and of the others."""

_REMEMBERED = 4
"""Forwards of steps of which the shortest counts: one that was held up makes no piece longer."""

WAITING_SHARE = 0.25
LONGEST_WAIT = 0.02
"""How long to wait for clients that are expected: a share of the last forward, and seconds."""

RECENT = 2.0
"""Forwards of steps fall out of mind after so many times what the last one took, and at least so
many seconds."""


@dataclass
class Pace:
    """What the last forwards were and took.

    Attributes:
        chunk: Most positions of a piece.
        seconds: Of the last forward of steps.
        ended: When it ended, on the batcher's clock.
        per_position: Seconds of one row's position in the last piece of a prompt.
    """

    chunk: int
    seconds: float = 0.0
    ended: float = 0.0
    per_position: float = 0.0
    _last: deque[frozenset[int]] = field(default_factory=lambda: deque(maxlen=2))
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def steps_ran(self, sessions: frozenset[int], seconds: float, ended: float) -> None:
        """Note a forward of the steps of these sessions."""
        self._last.append(sessions)
        self._seconds.append(seconds)
        self.seconds = seconds
        self.ended = ended

    def piece_ran(self, positions: int, seconds: float) -> None:
        """Note a forward of so many positions of prompts, those of all rows counted."""
        self.per_position = seconds / positions

    @property
    def stepping(self) -> int:
        """Sessions whose steps were in the last two forwards: they are expected in the next."""
        return len(frozenset().union(*self._last))

    def patience(self, now: float) -> float:
        """Return the seconds that are left to wait for whoever is expected."""
        return self.ended + min(self.seconds * WAITING_SHARE, LONGEST_WAIT) - now

    def piece(self, prompt: int, left: int, rows: int, short_prompts: int, now: float) -> int:
        """Return how many positions of a prompt to run now.

        Args:
            prompt: Its positions.
            left: Those that have not run.
            rows: Its rows.
            short_prompts: Prompts that wait, this one included, and fit into one chunk.
            now: The batcher's clock.
        """
        alone = now - self.ended > RECENT * max(self.seconds, 1)
        if alone or not self.per_position or not self._seconds:
            return min(left, self.chunk)
        short = prompt <= self.chunk
        if short and short_prompts > 1:
            return left
        share = SHORT_SHARE if short else LONG_SHARE
        fair = int(share * min(self._seconds) / self.per_position / rows)
        return min(max(fair, SHORTEST_PIECE), left, self.chunk)
