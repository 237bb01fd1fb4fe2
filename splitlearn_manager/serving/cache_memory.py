"""Memory for the caches of sessions, from the same ledger as that for models.

A session that says how long it will be has its memory reserved when it is opened, or is refused
then.  Any other reserves what its next step takes, in blocks, and a step that does not fit is
refused before it runs: the session stays as it is.

A model that was loaded with `kv_cache_memory` has so much reserved for its sessions from the
beginning.  They take from that, and from nothing else: neither do they find a full machine where
they were promised room, nor do they grow into what is free for models.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from splitlearn_core.machine import Memory
from splitlearn_core.page_sizes import HUGE, huge_pages_of
from splitlearn_manager.config.units import format_bytes
from splitlearn_manager.errors import InsufficientResourcesError
from splitlearn_manager.serving.errors import NoMemoryError

if TYPE_CHECKING:
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.resources import Reservation, ResourceManager

BLOCK = 64
"""Positions by which memory is reserved, and a cache grows that does not fill page by page
(`splitlearn_core.growing_layer`)."""

_ANY = Memory(sys.maxsize, sys.maxsize)  # nothing is read from the system for a reservation of 0


def bytes_for(per_position: int | None, rows: int, positions: int) -> int:
    """Return the bytes that a cache takes; 0 where not known.

    Its last block is counted whole, and its last huge page, where that is half full and so taken.
    """
    blocks = -(-positions // BLOCK)
    nbytes = (per_position or 0) * rows * blocks * BLOCK
    return max(nbytes, huge_pages_of(nbytes) * HUGE)


class CacheMemory:
    """What the sessions of every load of a model have reserved; each load has its own count.

    Args:
        resources: The ledger.
    """

    def __init__(self, resources: ResourceManager) -> None:
        self._resources = resources
        self._held: dict[AsyncManagedModel, Reservation] = {}

    def grow(self, managed: AsyncManagedModel, nbytes: int) -> None:
        """Reserve so many bytes more for the sessions of a load.

        Raises:
            NoMemoryError: They don't fit; nothing was reserved.
        """
        if nbytes <= 0:
            return
        if managed.kv_cache_budget is None:
            self._reserve(managed, nbytes)
        elif managed.kv_cache_bytes + nbytes > managed.kv_cache_budget:
            raise NoMemoryError(
                f"the cache would take {format_bytes(nbytes)} more, and sessions of"
                f" {managed.model_id!r} have {format_bytes(managed.kv_cache_bytes)} of the"
                f" {format_bytes(managed.kv_cache_budget)} that its kv_cache_memory gives them"
            )
        managed.kv_cache_bytes += nbytes

    def give_back(self, managed: AsyncManagedModel, nbytes: int) -> None:
        """Give bytes back that were reserved."""
        if nbytes <= 0:
            return
        managed.kv_cache_bytes -= nbytes
        held = self._held.get(managed)
        if held is not None:
            self._shrink_to(managed, held, held.nbytes - nbytes)

    def nbytes(self, managed: AsyncManagedModel) -> int:
        """Return what the sessions of a load have reserved."""
        return managed.kv_cache_bytes

    def _reserve(self, managed: AsyncManagedModel, nbytes: int) -> None:
        """Have bytes promised beside those of the model."""
        held = self._held.get(managed) or self._begin(managed)
        before = held.nbytes
        if held.resize(before + nbytes):
            self._shrink_to(managed, held, before)
            raise NoMemoryError(
                f"the cache would take {format_bytes(nbytes)} more on {held.device}, where models"
                f" and sessions may have {format_bytes(self._resources.capacity(held.device))}, and"
                f" sessions of {managed.model_id!r} have {format_bytes(before)}"
            )

    def nbytes_on(self, device: str) -> int:
        """Return what sessions have reserved on a device; in any thread."""
        return sum(held.nbytes for held in tuple(self._held.values()) if held.device == device)

    def _begin(self, managed: AsyncManagedModel) -> Reservation:
        """Begin to reserve for a load."""
        device = str(getattr(managed.model, "device", "cpu"))
        try:
            held = self._resources.reserve(managed.model_id, 0, device, _ANY)
        except InsufficientResourcesError as error:
            raise NoMemoryError(str(error)) from error
        held.resize(0)  # it is no load, which others would wait for
        self._held[managed] = held
        return held

    def _shrink_to(self, managed: AsyncManagedModel, held: Reservation, nbytes: int) -> None:
        if nbytes > 0:
            held.resize(nbytes)
        else:
            held.release()
            del self._held[managed]
