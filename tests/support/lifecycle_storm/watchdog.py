"""Sees an event loop that is blocked, from a thread beside it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

_BEAT = 0.02


class Watchdog:
    """Notes where the loop's thread stands whenever it has not come round for so many seconds.

    What stops the whole process (a busy machine) stops this thread as well, and is not held
    against the loop: only time in which the thread could look, and the loop did not come, counts.

    Attributes:
        blocked: The stacks that were found.
    """

    def __init__(self, seconds: float) -> None:
        self.blocked: list[str] = []
        self._looks = int(seconds / _BEAT)
        self._missed = 0
        self._thread_id = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._beats: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._beats = asyncio.create_task(self._beat(), name="watchdog")
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        assert self._beats is not None
        self._beats.cancel()
        await asyncio.wait({self._beats})
        self._thread.join()

    async def _beat(self) -> None:
        while True:
            self._missed = 0
            await asyncio.sleep(_BEAT / 2)

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._missed += 1
            if self._missed == self._looks:
                frame = sys._current_frames().get(self._thread_id)
                self.blocked.append("".join(traceback.format_stack(frame)[-6:]))
            time.sleep(_BEAT)
