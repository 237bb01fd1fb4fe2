"""What a session was sent: enough to bring another one to where it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from splitlearn_manager.config.retry import HISTORY_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

_ROW_BYTES = 8


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step that was answered.

    Attributes:
        message: The STEP frame as it travelled: the only copy, nothing was made for this.
        begin: The position that it began at.
        new: Positions that it has.
        kept: How many of them are left, the others having been rolled back.
    """

    message: bytes = field(repr=False)
    begin: int
    new: int
    kept: int


@dataclass(frozen=True, slots=True)
class SentRows:
    """A change of rows: from then on, they are those that are named.

    Attributes:
        rows: Numbers of the rows of before.
    """

    rows: tuple[int, ...]


class History(Generic[T]):
    """The steps and changes of rows that a session was sent, in their order.

    Sent again in their order, to an empty session of the same model, they leave it holding the
    same, to the bit where a forward gives the same bits again: steps are kept as they were, also
    where part of a step was rolled back since, because the other positions were computed in one
    forward with it.  What was rolled back as a whole is forgotten.

    Args:
        limit: Most bytes of it; when it would be more, all of it is dropped, and `complete` is
            false from then on.

    Attributes:
        complete: Whether the session can be brought to where it is by what is kept.
        nbytes: Bytes that are kept.
    """

    def __init__(self, limit: int = HISTORY_LIMIT) -> None:
        self.limit = limit
        self.complete = True
        self.nbytes = 0
        self._entries: list[SentStep | SentRows] = []
        self._results: dict[int, T] = {}  # what the first and the last steps gave, by entry

    def __len__(self) -> int:
        """Return how many positions it leads to, as far as it is complete."""
        for entry in reversed(self._entries):
            if isinstance(entry, SentStep):
                return entry.begin + entry.kept
        return 0

    def __iter__(self) -> Iterator[tuple[SentStep | SentRows, T | None]]:
        """Yield what was sent, each with what is known of its result."""
        for number, entry in enumerate(self._entries):
            yield entry, self._results.get(number)

    def add_step(self, message: bytes, begin: int, new: int, result: T) -> None:
        """Take down a step, and something by which its result is known again.

        Of the results those of the first step and of the last two are kept: the first tells
        another model apart at once, the last whether all of it came out the same.
        """
        if not self.complete:
            return
        number = len(self._entries)
        for old in sorted(self._results)[1:-1]:
            del self._results[old]
        self._results[number] = result
        self._add(SentStep(message, begin, new, new))

    def add_rows(self, rows: tuple[int, ...]) -> None:
        """Take down a change of rows."""
        if self._entries:
            self._add(SentRows(rows))

    def roll_back(self, length: int) -> None:
        """Take down that the positions from `length` on were rolled back."""
        for number in range(len(self._entries) - 1, -1, -1):
            entry = self._entries[number]
            if not isinstance(entry, SentStep):
                continue
            if entry.begin + entry.kept <= length:
                break
            if entry.begin < length:
                self._entries[number] = replace(entry, kept=length - entry.begin)
                break
            self.nbytes -= _nbytes(entry)
            del self._entries[number]
            self._results.pop(number, None)
            self._results = {n - (n > number): result for n, result in self._results.items()}
        if not length:
            self.clear()

    def copy(self) -> History[T]:
        """Return another that goes its own way; they share the messages."""
        other: History[T] = History(self.limit)
        other.complete, other.nbytes = self.complete, self.nbytes
        other._entries, other._results = list(self._entries), dict(self._results)
        return other

    def clear(self) -> None:
        """Forget all of it: the session holds nothing."""
        self._drop()
        self.complete = True

    def _add(self, entry: SentStep | SentRows) -> None:
        self._entries.append(entry)
        self.nbytes += _nbytes(entry)
        if self.nbytes > self.limit:
            self._drop()
            self.complete = False

    def _drop(self) -> None:
        self._entries, self._results, self.nbytes = [], {}, 0


def _nbytes(entry: SentStep | SentRows) -> int:
    if isinstance(entry, SentStep):
        return len(entry.message)
    return _ROW_BYTES * len(entry.rows)
