"""The batchers of all loads of models that have sessions."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from splitlearn_manager.serving.batcher import Batcher, BatchLimits, ForwardMetrics, Turn
from splitlearn_manager.serving.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_core.joined_cache import Joinable
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.serving.step import State


class Batchers:
    """The batchers of all loads that have sessions, one for each.

    Args:
        limits: How far sessions share forwards.
        metrics: Who counts.
        clock: Monotonic seconds.
        on_turn: Called with the turn of each step that was answered, in its caller's context.
    """

    def __init__(
        self,
        limits: BatchLimits,
        metrics: ForwardMetrics,
        clock: Callable[[], float],
        on_turn: Callable[[Turn], None] | None = None,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._on_turn = on_turn
        self._running: dict[AsyncManagedModel, Batcher] = {}
        self._paces: WeakKeyDictionary[AsyncManagedModel, Pace] = WeakKeyDictionary()
        self._ending: set[asyncio.Task[None]] = set()

    def take(self, managed: AsyncManagedModel) -> Batcher:
        """Return a load's batcher for one session more; it is started with the first."""
        batcher = self._running.get(managed) or self._start(managed)
        batcher.sessions += 1
        return batcher

    def _start(self, managed: AsyncManagedModel) -> Batcher:
        pace = self._paces.setdefault(managed, Pace(self._limits.piece))
        pace.begin_anew()
        can = _joinable(managed)
        batcher = Batcher(
            managed, self._limits, can, self._metrics, self._clock, self._on_turn, pace
        )
        batcher.start()
        self._running[managed] = batcher
        return batcher

    def give_back(self, managed: AsyncManagedModel, state: State) -> None:
        """Count a session less, whose state this was; the batcher is stopped with the last."""
        batcher = self._running[managed]
        batcher.sessions -= 1
        batcher.forget(state)
        if not batcher.sessions:
            del self._running[managed]
            task = batcher.stop()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def waiting(self) -> Counter[str]:
        """Return how many steps of each model wait for their turn; in any thread."""
        waiting: Counter[str] = Counter()
        for managed, batcher in tuple(self._running.items()):
            waiting[managed.model_id] += batcher.waiting
        return waiting

    async def ended(self) -> None:
        """Wait for the batchers that were stopped."""
        if self._ending:
            await asyncio.wait(self._ending)


def _joinable(managed: AsyncManagedModel) -> Joinable:
    from splitlearn_core.joined_cache import joinable  # noqa: PLC0415 - imports torch
    from splitlearn_core.session_attention import attend_in_place  # noqa: PLC0415 - likewise

    attend_in_place(managed.model)
    return joinable(managed.model)
