"""Whose turn it is among the prompts of one model: pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar


class Prompt(Protocol):
    """What is asked of a prompt that waits for its next piece."""

    @property
    def length(self) -> int:
        """Its positions."""
        ...

    @property
    def left(self) -> int:
        """Those that have not run."""
        ...


P = TypeVar("P", bound=Prompt)


def take_pieces(
    waiting: deque[P], room: int, piece_of: Callable[[P], int], *, cut: bool = False
) -> Iterator[tuple[P, int]]:
    """Take the prompts that have a piece in the next round, and say how long it is.

    They take turns: one that has more left than its piece goes behind the others, so that none
    waits longer than for one piece of each.  There is always one piece.

    Args:
        waiting: The prompts, whose turn is next first; those with something left are put back.
        room: Positions of all pieces together, the first one's aside.
        piece_of: Returns how long a prompt's piece may be.
        cut: Whether a piece may be any shorter, so that it still fits in.
    """
    again: list[P] = []
    taken = 0
    while waiting:
        prompt = waiting[0]
        piece = min(prompt.left, piece_of(prompt))
        if cut:
            piece = min(piece, max(room - taken, 0 if taken else 1))
        if taken and (taken + piece > room or not piece):
            break
        waiting.popleft()
        if prompt.left > piece:
            again.append(prompt)
        taken += piece
        yield prompt, piece
    waiting.extend(again)
