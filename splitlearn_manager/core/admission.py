"""Who gets memory next: loads are served in the order in which they ask, device by device.

A load that does not fit now waits as long as something is being given back: an unload that is not
finished, another load that is still at its worst moment.  Otherwise idle models are evicted, if
that is allowed, or the load is refused, with every figure.  Nobody overtakes a load that waits:
small ones that still fit would keep a large one out for ever.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Protocol

from splitlearn_manager.core.doorbell import doorbell_of
from splitlearn_manager.core.resources import pool_of
from splitlearn_manager.errors import InsufficientResourcesError

if TYPE_CHECKING:
    from splitlearn_core.machine import Memory
    from splitlearn_manager.core.resources import Reservation, ResourceManager


class Evictor(Protocol):
    """Who can make room."""

    def evict_for(self, model_id: str, nbytes: int, device: str) -> bool:
        """Begin to unload idle models that hold so many bytes; return whether there are any."""


class Admission:
    """The queues for memory.

    Args:
        resources: Who promises it.
        lock: The manager's, held for each look and the decision that follows.
        evictor: Who makes room; asked only after nothing else is being given back.
        patience: Seconds for which a load waits for what is being given back.

    Attributes:
        patience: The same, for loads that begin to wait from now on.
    """

    def __init__(
        self,
        resources: ResourceManager,
        lock: asyncio.Lock,
        evictor: Evictor,
        patience: float,
    ) -> None:
        self._resources = resources
        self._lock = lock
        self._evictor = evictor
        self.patience = patience
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def reserve(self, model_id: str, nbytes: int, device: str, memory: Memory) -> Reservation:
        """Have bytes promised to a load, when its turn has come and there is room.

        Args:
            model_id: Whose they will be.
            nbytes: How many, at the worst moment.
            device: Where.
            memory: What that device had a moment ago.

        Raises:
            InsufficientResourcesError: They don't fit, and nothing will change that by itself.
        """
        changed = asyncio.Event()
        tell = partial(doorbell_of(asyncio.get_running_loop()).call, changed.set)
        self._resources.on_change.append(tell)
        try:
            async with self._turns[pool_of(device)]:
                return await self._wait(model_id, nbytes, device, memory, changed)
        finally:
            self._resources.on_change.remove(tell)

    async def _wait(
        self, model_id: str, nbytes: int, device: str, memory: Memory, changed: asyncio.Event
    ) -> Reservation:
        """Try, and try again whenever something was given back."""
        patience = self.patience
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            changed.clear()
            async with self._lock:
                try:
                    return self._resources.reserve(model_id, nbytes, device, memory)
                except InsufficientResourcesError as refusal:
                    if not self._will_change(model_id, nbytes, device, memory):
                        raise
                    refused = refusal
            try:
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError:
                raise InsufficientResourcesError(
                    f"{refused}; waited {patience:g} s for what is being given back"
                ) from None
            memory = await asyncio.to_thread(self._resources.memory, device)

    def _will_change(self, model_id: str, nbytes: int, device: str, memory: Memory) -> bool:
        """Whether waiting makes sense; evicts to make it so, if it can."""
        if nbytes > self._resources.capacity(device):
            return False
        if self._resources.is_changing(device):
            return True
        missing = self._resources.shortfall(nbytes, device, memory)
        if missing == 0:
            return True  # a thread has just given back what was missing, and is about to say so
        return self._evictor.evict_for(model_id, missing, device)
