"""Unloading: each unload has one task, its owner, which removes the entry whatever happens.

A model is drained (its leases end, or are ended at the deadline), then closed in its own thread,
and it is gone when its memory is back.  Where that can't be had, because a forward hangs or
somebody still refers to the model, the entry goes all the same, what is missing is said, and the
memory stays reserved until it is really free.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from splitlearn_manager.core.disposal import release_when_gone
from splitlearn_manager.core.doorbell import in_loop
from splitlearn_manager.core.drain import Drain
from splitlearn_manager.core.states import ABSENT, ModelStatus
from splitlearn_manager.core.table import new_operation_id

if TYPE_CHECKING:
    from concurrent.futures import Future

    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.owners import Owners
    from splitlearn_manager.core.resources import Reservation
    from splitlearn_manager.core.table import ModelTable

logger = logging.getLogger(__name__)

LONGEST = 3.2e9
"""Seconds above which nobody waits for the end; event loops have no room for any number."""

DRAIN_TIMEOUT = 20.0
"""Seconds that uses in flight are given, where the caller says nothing."""

GRACE = 5.0
"""Seconds that those whose time is up are given to go, and then a model's thread to end."""


class Unloads:
    """The unloads of one manager.

    Args:
        table: Whose entries they remove.
        owners: Who keeps their tasks.
        grace: Seconds for what was ended to go.
    """

    def __init__(self, table: ModelTable, owners: Owners, grace: float = GRACE) -> None:
        self._table = table
        self._owners = owners
        self._grace = grace

    def start(
        self, managed: AsyncManagedModel, reason: str, seconds: float | None, code: str = ""
    ) -> None:
        """Refuse new uses, and start the task that owns the unload.

        Args:
            managed: A model that is ready, or that was replaced.
            reason: Why, in words.
            seconds: The deadline of its drain; `None` for none.
            code: Why, in a word for programs.
        """
        managed.operation_id = new_operation_id()
        managed.stop_timer()
        self._table.move(managed, ModelStatus.UNLOADING, reason, code=code)
        if managed.reservation is not None:
            managed.reservation.leaving = True
        managed.drain = Drain(managed, seconds, self._grace)
        self._owners.own(
            self._unload(managed, managed.drain), f"unload of model {managed.model_id}"
        )

    async def _unload(self, managed: AsyncManagedModel, drain: Drain) -> None:
        """Own an unload."""
        try:
            await drain.ended()
            closing = in_loop(managed.close())
            await asyncio.wait({closing}, timeout=self._grace)
        except asyncio.CancelledError:
            logger.warning("the drain of model %s was given up", managed.model_id)
        finally:
            self._settle(managed)

    def _settle(self, managed: AsyncManagedModel) -> None:
        """Remove the entry, and see to it that its memory is accounted for."""
        closed = managed.close()
        managed.release_cache_budget()
        managed.unreturned_bytes = _unreturned(managed, closed)
        missing = managed.unreturned_bytes
        reason = f"unloaded, but {missing} bytes are not back" if missing else "unloaded"
        if missing:
            logger.warning("model %s: %s", managed.model_id, _why_not_back(managed, closed))
        closed.add_done_callback(partial(_release, managed.reservation))
        self._table.move(managed, ABSENT, reason, unreturned=missing)
        managed.mark_gone()


def check_timeout(seconds: float | None) -> float | None:
    """Return a time limit as asyncio has it: `None` is for ever; given `None`, the usual one.

    What is longer than a century, `math.inf` included, is for ever.

    Raises:
        ValueError: It is negative, or not a number.
    """
    if seconds is None:
        return DRAIN_TIMEOUT
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ValueError(f"a timeout must be a number of seconds, found {seconds!r}")  # noqa: TRY004
    if seconds > LONGEST:
        return None
    if not seconds >= 0:  # as NaN is not
        raise ValueError(f"a timeout must be 0 seconds or more, found {seconds!r}")
    return seconds


def _unreturned(managed: AsyncManagedModel, closed: Future[Any]) -> int:
    """Return what of a model's memory is not back."""
    if closed.done() and not closed.cancelled() and closed.result() is None:
        return 0
    return managed.resident_bytes or _held(managed)


def _why_not_back(managed: AsyncManagedModel, closed: Future[Any]) -> str:
    """Say why memory is not back."""
    what = f"{managed.unreturned_bytes} bytes are not back and stay reserved"
    if not closed.done():
        return f"{what}: its thread is still at work"
    return f"{what}: something else still refers to the model"


def _release(reservation: Reservation | None, closed: Future[Any]) -> None:
    """Release a model's memory when it is gone."""
    release_when_gone(reservation, None if closed.cancelled() else closed.result())


def _held(managed: AsyncManagedModel) -> int:
    """Return what is reserved for a model."""
    return 0 if managed.reservation is None else managed.reservation.nbytes
