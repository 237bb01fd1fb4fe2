"""What the sessions of a model take, as figures at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ModelUsage:
    """Of all sessions of one model, of every load of it.

    Attributes:
        sessions: How many are open.
        waiting: Steps that wait for their turn, or for that of their next piece.
        tokens: Positions in their caches, times rows.
        allocated_bytes: Memory of these caches, measured.
        reserved_bytes: Memory that was promised to them.
    """

    sessions: int = 0
    waiting: int = 0
    tokens: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
