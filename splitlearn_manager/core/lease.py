"""Being in use: what keeps a model from being unloaded, and how that is ended when it must be.

A model is lent out in two ways, and both are leases on it:

- a *use* is a block of somebody's task, `async with manager.use(…)`; ending it cancels the block,
  which then raises why;
- a *hold* is kept for something that is no block, as a session is; ending it calls whoever has it.

A model goes when its leases are gone; at the deadline of its drain, those that are left are ended.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.errors import ManagerError


class Lease(Protocol):
    """What keeps a model from being unloaded."""

    def end(self, error: ManagerError) -> None:
        """End it from the model's side, saying why."""


class Use:
    """Lends a model to a block; what `AsyncModelManager.use` returns.

    Ending it works as `asyncio.timeout` does: the block's task is cancelled, and where that comes
    out of the block, it becomes the error that says why.

    Args:
        find: Returns the model, or raises why it can't be had.
    """

    def __init__(self, find: Callable[[], AsyncManagedModel]) -> None:
        self._find = find
        self._managed: AsyncManagedModel | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._error: ManagerError | None = None

    async def __aenter__(self) -> AsyncManagedModel:
        """Take the lease."""
        if self._managed is not None:
            raise RuntimeError("this use of a model has begun already; ask the manager for another")
        managed = self._find()  # no await from here to `lend`: nothing comes between
        managed.lend(self)
        self._managed = managed
        self._task = asyncio.current_task()
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        return managed

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        if self._managed is not None:
            self._managed.give_back(self)
        if self._error is None or self._task is None:
            return
        ours = self._task.uncancel() <= self._cancelling
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise self._error from error

    def end(self, error: ManagerError) -> None:
        """Cancel the block."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()


class Hold:
    """Keeps a model for something that outlasts any one task.

    Args:
        managed: The model.
        ended: Called once if the hold is ended from the model's side; must not block, and is to
            `release` it now or soon.
    """

    def __init__(self, managed: AsyncManagedModel, ended: Callable[[ManagerError], None]) -> None:
        self._managed = managed
        self._ended: Callable[[ManagerError], None] | None = ended
        managed.lend(self, counts=False)

    def release(self) -> None:
        """Give the model back; a second time does nothing."""
        self._managed.give_back(self)
        self._ended = None

    def end(self, error: ManagerError) -> None:
        """Tell whoever has it."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(error)
