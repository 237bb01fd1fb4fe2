"""Texts at which an answer ends, wherever tokens begin and end."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first of some texts, of which nothing gets out.

    What may be the beginning of one is kept back until more has come.

    Attributes:
        stopped: Whether one of them has come.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._kept = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return what is sure to belong to the answer."""
        if self.stopped or not self._texts:
            return "" if self.stopped else text
        self._kept += text
        found = [at for at in (self._kept.find(stop) for stop in self._texts) if at >= 0]
        if found:
            self.stopped = True
            return self._take(min(found), drop=True)
        return self._take(len(self._kept) - self._doubtful())

    def finish(self) -> str:
        """Return what was kept back: no more comes."""
        return self._take(len(self._kept))

    def _doubtful(self) -> int:
        """Return how many characters at the end may be the beginning of one of the texts."""
        longest = max(map(len, self._texts)) - 1
        for length in range(min(longest, len(self._kept)), 0, -1):
            if any(stop.startswith(self._kept[-length:]) for stop in self._texts):
                return length
        return 0

    def _take(self, length: int, *, drop: bool = False) -> str:
        taken, left = self._kept[:length], self._kept[length:]
        self._kept = "" if drop else left
        return taken
