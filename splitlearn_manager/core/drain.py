"""The time that the leases on a model are given to end, before they are ended."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from splitlearn_manager.errors import DrainTimeoutError

if TYPE_CHECKING:
    from splitlearn_manager.core.entries import AsyncManagedModel

logger = logging.getLogger(__name__)


class Drain:
    """Waits until nobody uses a model; at its deadline, ends what is left.

    Args:
        managed: The model, which takes no new use any more.
        seconds: Until the deadline; `None` for ever.
        grace: Seconds after it that those who were ended are given to go.
    """

    def __init__(self, managed: AsyncManagedModel, seconds: float | None, grace: float) -> None:
        self._managed = managed
        self._grace = grace
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        managed.on_idle = self._finish
        if managed.is_idle:
            self._finish()
        else:
            self.shorten(seconds)

    @property
    def is_over(self) -> bool:
        """Whether nobody is waited for any more."""
        return self._end.done()

    def shorten(self, seconds: float | None) -> None:
        """Set a deadline so many seconds from now, unless it already has an earlier one."""
        when = math.inf if seconds is None else self._loop.time() + seconds
        if when < self._deadline and not self._end.done():
            self._deadline = when
            self._wake_at(when)

    async def ended(self) -> None:
        """Wait until nobody uses the model, or nothing more can be done about it."""
        await asyncio.shield(self._end)

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._over)

    def _over(self) -> None:
        """End every lease; after the grace, stop waiting for those that do not go."""
        model_id = self._managed.model_id
        count = self._managed.cut(
            DrainTimeoutError(
                f"model {model_id!r} is being unloaded, and this use of it had not ended at the"
                " deadline"
            )
        )
        logger.warning("model %s: ended %d use(s) at the deadline of its drain", model_id, count)
        self._deadline = -math.inf
        self._timer = self._loop.call_later(self._grace, self._finish)
        if self._managed.is_idle:
            self._finish()

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._end.done():
            self._end.set_result(None)
