"""The tasks that own entries: each is awaited by somebody, whatever becomes of its caller."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

logger = logging.getLogger(__name__)


class Owners:
    """The running owners of a manager's loads and unloads."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def own(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that owns an entry, and keep it until it ends."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self, seconds: float | None) -> None:
        """Wait for all of them to end, and give those up that do not in time."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=seconds)
        for task in late:
            logger.warning("gave up the %s after %g s", task.get_name(), seconds)
            task.cancel()
        if late:
            await asyncio.wait(late)

    def __iter__(self) -> Iterator[asyncio.Task[None]]:
        """Return the tasks that run now."""
        return iter(tuple(self._tasks))

    def __len__(self) -> int:
        """Return how many run."""
        return len(self._tasks)
