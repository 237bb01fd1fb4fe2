"""Which idle models go to make room: pure, a choice among candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Candidate:
    """A model that nobody uses, and that may go.

    Attributes:
        model_id: Which.
        nbytes: What its going gives back.
        last_used: When it was last used (or loaded), on any one clock.
    """

    model_id: str
    nbytes: int
    last_used: float


def choose(candidates: Iterable[Candidate], nbytes: int) -> list[str]:
    """Return the models to evict to get `nbytes` back: the least recently used first.

    None goes in vain: if all of them together would not do, none is chosen; and one that the
    others make superfluous stays, the most recently used first.
    """
    chosen: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: c.last_used):
        if sum(c.nbytes for c in chosen) >= nbytes:
            break
        if candidate.nbytes > 0:
            chosen.append(candidate)
    spare = sum(c.nbytes for c in chosen) - nbytes
    if spare < 0:
        return []
    needed = []
    for candidate in reversed(chosen):
        if candidate.nbytes <= spare:
            spare -= candidate.nbytes
        else:
            needed.append(candidate.model_id)
    return needed[::-1]


def least_recently_used(candidates: Iterable[Candidate], count: int) -> list[str]:
    """Return the models to evict to get `count` places back; none, if there are not so many."""
    ordered = sorted(candidates, key=lambda c: c.last_used)
    return [c.model_id for c in ordered[:count]] if len(ordered) >= count else []
