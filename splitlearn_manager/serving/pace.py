"""How long the turns of a model's sessions are: for whom to wait, and how much of a prompt to run.

Pure bookkeeping of what the last forwards were and took; the batcher, which runs them, tells it.

Those who step and those who wait for their first token have a claim to the model both.  While a
long prompt runs beside steps, a piece of it takes at most `LONG_SHARE` of a forward of the steps,
so that a step takes less than three times as long as usual, however long that goes on.  A prompt
that fits into one chunk is soon done, and small pieces cost more than large ones: its pieces take
more, and where several such prompts wait, each runs in one piece, so that forwards of steps soon
have all their rows.

Where pieces are in the same forward as steps (packed), they share what it costs to read the
weights: small pieces cost little more than large ones, and none has to run whole.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

SHORTEST_PIECE = 8
"""Positions; by itself a shorter piece would cost as much time, and beside steps prompts would
never end."""

LONG_SHARE = 1.6
SHORT_SHARE = 4.0
"""Seconds of a piece of a prompt for each second of a forward of steps: of prompts that are longer
than a chunk, and of the others."""

PACKED_LONG_SHARE = 1.2
PACKED_SHORT_SHARE = 2.0
"""Likewise, of pieces in the same forward as steps, which then take 2.2 and 3 times as long."""

_REMEMBERED = 4
"""Forwards of steps of which the shortest counts, and packed pieces of which the dearest does: one
that was held up makes none longer, nor one that seemed cheap."""

_MOST_MIXED = 8
"""Forwards of steps and prompts in a row, after which one of steps alone tells what these take."""

WAITING_SHARE = 0.25
LONGEST_WAIT = 0.02
"""How long to wait for clients that are expected: a share of the last forward, and seconds."""

STRAGGLERS_SHARE = 0.05
LONGEST_STRAGGLERS_WAIT = 0.004
"""How long to wait after each that comes for the next one that is expected, likewise: the steps of
a gateway's requests come together, long after the last forward."""

COMPANY_SHARE = 0.02
LONGEST_COMPANY_WAIT = 0.005
"""How long a prompt waits for another to come with it: a share of what it takes, and seconds."""

_LEAST_BEYOND = 0.1
"""Share of a forward of steps and pieces that is the pieces', whatever its steps take alone."""

_TELLING = 64
"""Positions of a forward that mainly takes what they take, and not what it takes anyway."""

RECENT = 2.0
"""Forwards of steps fall out of mind after so many times what the last one took, and at least so
many seconds."""


@dataclass
class Pace:
    """What the last forwards were and took.

    Attributes:
        chunk: Most positions of a piece.
        seconds: Of the last forward with steps in it.
        ended: When it ended, on the batcher's clock.
        per_position: Seconds of one row's position in the last piece of a prompt; of packed ones,
            in the dearest of the last few, what steps beside it take aside.
    """

    chunk: int
    seconds: float = 0.0
    ended: float = 0.0
    per_position: float = 0.0
    _last: deque[frozenset[int]] = field(default_factory=lambda: deque(maxlen=2))
    _costs: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _mixed: int = 0
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _newcomers: frozenset[int] = frozenset()
    _prompts_ended: float = 0.0
    _prompts_seconds: float = 0.0
    _most_per_position: float = 0.0

    def steps_ran(self, sessions: frozenset[int], seconds: float, ended: float) -> None:
        """Note a forward of the steps of these sessions."""
        if self._mixed:  # what was remembered is from before
            self._seconds = deque(list(self._seconds)[-1:], self._seconds.maxlen)
            self._mixed = 0
        self._stepped(sessions, seconds, ended)
        self._seconds.append(seconds)

    def piece_ran(self, positions: int, seconds: float) -> None:
        """Note a forward of so many positions of prompts, those of all rows counted."""
        self.per_position = seconds / positions

    def packed_ran(
        self, sessions: frozenset[int], positions: int, seconds: float, ended: float
    ) -> None:
        """Note a forward of steps of these sessions, and of so many positions of prompts."""
        if not (sessions or positions):
            return
        if not positions:
            self.steps_ran(sessions, seconds, ended)
            return
        self._most_per_position = seconds / positions  # there is more in it, if they are few
        if sessions:
            self._mixed += 1
            self._stepped(sessions, seconds, ended)
        if self._seconds or positions >= _TELLING:
            beyond = seconds - min(self._seconds, default=0)
            self._costs.append(max(beyond, seconds * _LEAST_BEYOND) / positions)
            self.per_position = max(self._costs)

    def prompts_ended(self, sessions: frozenset[int], seconds: float, ended: float) -> None:
        """Note that the prompts of these sessions ended with a forward: their first steps follow.

        They are expected until a forward of steps has run, with them or without.
        """
        if sessions:
            self._newcomers |= sessions
            self._prompts_seconds, self._prompts_ended = seconds, ended

    def _stepped(self, sessions: frozenset[int], seconds: float, ended: float) -> None:
        """Note a forward with the steps of these sessions in it."""
        self._last.append(sessions)
        self.seconds, self.ended = seconds, ended
        self._newcomers = frozenset()

    def forget(self, session: int) -> None:
        """Expect a session no longer, which has ended."""
        self._newcomers -= {session}
        for number, sessions in enumerate(self._last):
            self._last[number] = sessions - {session}

    def begin_anew(self) -> None:
        """Forget who stepped, and remember what forwards take."""
        self._last.clear()
        self._newcomers = frozenset()

    @property
    def knows_steps(self) -> bool:
        """Whether it is known how long a forward of steps alone takes, and not from long ago."""
        return bool(self._seconds) and self._mixed < _MOST_MIXED

    def expected(self, *, newcomers: bool = True) -> int:
        """Return how many sessions are expected to step.

        Args:
            newcomers: Whether those count whose prompts have just ended, besides those whose steps
                were in the last two forwards.
        """
        return len(frozenset().union(*self._last, self._newcomers if newcomers else ()))

    def patience(self, now: float) -> float:
        """Return the seconds to wait for the next one that is expected; 0 if none is."""
        waits = [0.0]
        if not self._alone(now):
            waits.append(_patience(self.ended, self.seconds, now))
        if self._newcomers and not _long_ago(self._prompts_ended, self._prompts_seconds, now):
            waits.append(_patience(self._prompts_ended, self._prompts_seconds, now))
        return max(waits)

    def company(self, positions: int) -> float:
        """Return the seconds to wait for another prompt, where so many positions wait to run.

        As long as no prompt ran, that is the longest: what a first one takes is much.
        """
        each = self.per_position or self._most_per_position
        if not each:
            return LONGEST_COMPANY_WAIT
        return min(positions * each * COMPANY_SHARE, LONGEST_COMPANY_WAIT)

    def room(self, now: float, *, short: bool, beside: bool) -> int:
        """Return how many positions of prompts go into one packed forward.

        Args:
            now: The batcher's clock.
            short: Whether every prompt that waits fits into one chunk.
            beside: Whether there are steps in it.
        """
        if (not beside and self._alone(now)) or not self.per_position or not self._seconds:
            return self.chunk
        share = PACKED_SHORT_SHARE if short else PACKED_LONG_SHARE
        fair = int(share * min(self._seconds) / self.per_position)
        return min(max(fair, SHORTEST_PIECE), self.chunk)

    def _alone(self, now: float) -> bool:
        """Whether nobody has stepped for a while."""
        return not self._last or _long_ago(self.ended, self.seconds, now)

    def piece(self, prompt: int, left: int, rows: int, short_prompts: int, now: float) -> int:
        """Return how many positions of a prompt to run now.

        Args:
            prompt: Its positions.
            left: Those that have not run.
            rows: Its rows.
            short_prompts: Prompts that wait, this one included, and fit into one chunk.
            now: The batcher's clock.
        """
        if self._alone(now) or not self.per_position or not self._seconds:
            return min(left, self.chunk)
        short = prompt <= self.chunk
        if short and short_prompts > 1:
            return left
        share = SHORT_SHARE if short else LONG_SHARE
        fair = int(share * min(self._seconds) / self.per_position / rows)
        return min(max(fair, SHORTEST_PIECE), left, self.chunk)


def _patience(ended: float, seconds: float, now: float) -> float:
    """Return how long to wait for whom a forward answered."""
    left = ended + min(seconds * WAITING_SHARE, LONGEST_WAIT) - now
    return max(left, min(seconds * STRAGGLERS_SHARE, LONGEST_STRAGGLERS_WAIT))


def _long_ago(ended: float, seconds: float, now: float) -> bool:
    """Whether a forward is out of mind."""
    return now - ended > RECENT * max(seconds, 1)
