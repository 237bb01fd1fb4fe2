"""Models that nobody uses: unloaded when their time is up, or evicted to make room for others."""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING

from splitlearn_manager.core.entries import AsyncManagedModel
from splitlearn_manager.core.eviction import Candidate, choose, least_recently_used
from splitlearn_manager.core.resources import pool_of
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.core.unloads import DRAIN_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from splitlearn_manager.core.table import ModelTable
    from splitlearn_manager.core.unloads import Unloads

IDLE = "idle"
EVICTED = "evicted"
"""Why a model went, in a word: nobody used it for its time to live, or others needed the room."""


class IdleModels:
    """What may go among a manager's models.

    A model that is in use, pinned, being loaded, being unloaded or being reloaded never may.

    Args:
        table: The models.
        unloads: Who unloads them.
        evicts: Whether models may be evicted at all.
        clock: Seconds, as `idle_since` has them.

    Attributes:
        evicts: Whether models may be evicted at all, from now on.
    """

    def __init__(
        self,
        table: ModelTable,
        unloads: Unloads,
        *,
        evicts: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._unloads = unloads
        self.evicts = evicts
        self._clock = clock

    # --- Eviction --------------------------------------------------------------------------

    def evict_for(self, model_id: str, nbytes: int, device: str) -> bool:
        """Begin to unload idle models that hold so many bytes; return whether there are any."""
        if not self.evicts:
            return False
        pool = pool_of(device)
        candidates = (
            Candidate(m.model_id, _held(m), m.idle_since)
            for m in self._may_go()
            if m.model_id != model_id and pool_of(m.config.device) == pool
        )
        return self._evict(choose(candidates, nbytes), model_id)

    def evict_places(self, model_id: str, count: int) -> bool:
        """Begin to unload so many idle models; return whether there are as many."""
        if not self.evicts:
            return False
        candidates = (
            Candidate(m.model_id, _held(m), m.idle_since)
            for m in self._may_go()
            if m.model_id != model_id
        )
        return self._evict(least_recently_used(candidates, count), model_id)

    def _evict(self, victims: list[str], model_id: str) -> bool:
        for victim in victims:
            managed = self._table.models[victim]
            if isinstance(managed, AsyncManagedModel):
                managed.evicted = True
                self._unloads.start(
                    managed, f"evicted to make room for {model_id}", DRAIN_TIMEOUT, EVICTED
                )
        return bool(victims)

    def _may_go(self) -> Iterator[AsyncManagedModel]:
        """Yield the models that nobody would miss now."""
        for entry in self._table.models.values():
            if isinstance(entry, AsyncManagedModel) and self._is_free(entry):
                yield entry

    def _is_free(self, managed: AsyncManagedModel) -> bool:
        return (
            managed.status is ModelStatus.READY
            and managed.is_idle
            and not managed.config.pinned
            and managed.model_id not in self._table.successors
        )

    # --- Time to live ----------------------------------------------------------------------

    def watch(self, managed: AsyncManagedModel) -> None:
        """Unload a model that is ready when nobody has used it for its time to live.

        Called again where the time to live is another one.
        """
        managed.stop_timer()
        managed.on_idle = None
        if managed.config.ttl is not None:
            managed.on_idle = partial(self._rest, managed)
            self._rest(managed)

    def close(self) -> None:
        """Stop every timer."""
        for entry in self._table.models.values():
            if isinstance(entry, AsyncManagedModel):
                entry.stop_timer()

    def _rest(self, managed: AsyncManagedModel) -> None:
        """Begin to wait: a model has just become idle."""
        self._wake_after(managed, managed.config.ttl or 0.0)

    def _wake_after(self, managed: AsyncManagedModel, seconds: float) -> None:
        """Look at a model after so many seconds, and not before."""
        managed.stop_timer()
        loop = asyncio.get_running_loop()
        # in a context of its own: what comes of it is no part of the request that has just ended
        managed.timer = loop.call_later(seconds, self._look, managed, context=Context())

    def _look(self, managed: AsyncManagedModel) -> None:
        """Unload a model whose time is up; one in use is looked at again when it is idle."""
        ttl = managed.config.ttl
        if ttl is None or self._table.models.get(managed.model_id) is not managed:
            return
        left = managed.idle_since + ttl - self._clock()
        if managed.model_id in self._table.successors:
            left = max(left, ttl)
        if left > 0:
            self._wake_after(managed, left)
        elif self._is_free(managed):
            self._unloads.start(managed, f"nobody used it for {ttl:g} s", DRAIN_TIMEOUT, IDLE)


def _held(managed: AsyncManagedModel) -> int:
    """Return what a model's going gives back."""
    return 0 if managed.reservation is None else managed.reservation.nbytes
