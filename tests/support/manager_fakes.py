"""A loader with real behaviour, whose loads end when the test says so, and what watches them."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

from splitlearn_core.estimate import MemoryEstimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.events import TransitionEvent
    from splitlearn_manager.core.progress import LoadProgress

PATIENCE = 60.0
"""Seconds after which a test that should never wait so long fails instead of hanging."""


async def until(true: Callable[[], bool]) -> None:
    """Let the loop run until something holds; for what no event tells of."""
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


class FakeModel:
    """A model that knows its size, and answers with what it was asked."""

    component = "trunk"
    start_layer = 2
    end_layer = 6
    device = "cpu"
    dtype = "float32"

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.threads: list[str] = []
        self.closed = threading.Event()

    def resident_bytes(self) -> int:
        return self.nbytes

    def close(self) -> None:
        self.closed.set()

    def __call__(self, value: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return value


class HeldLoad:
    """One load that waits for the test.

    Attributes:
        error: What it ends with, instead of a model.
        nbytes: The measured size of its model.
        listens: Whether it reports progress, and so finds out that it is to stop.
        closed: Set when its model was closed; `None` while there is no model.
    """

    def __init__(self, error: BaseException | None = None, nbytes: int = 60) -> None:
        self.error = error
        self.nbytes = nbytes
        self.listens = True
        self.closed: threading.Event | None = None
        self._started = threading.Event()
        self._released = threading.Event()

    async def started(self) -> None:
        """Wait until the loader's thread is in the load."""
        assert await asyncio.to_thread(self._started.wait, PATIENCE)

    def release(self) -> None:
        """Let the load go on."""
        self._released.set()

    def run(self, progress: LoadProgress | None) -> FakeModel:
        self._started.set()
        assert self._released.wait(PATIENCE)
        if progress is not None and self.listens:
            progress(100, 100)
        if self.error is not None:
            raise self.error
        model = FakeModel(self.nbytes)
        self.closed = model.closed
        return model


class FakeLoader:
    """Loads at once, unless the test holds a load, in the order in which it holds them.

    Attributes:
        estimates: What a model is estimated to need; peak 100 and steady 60 if nothing is said.
        loads: Ids in the order in which their loads began.
    """

    def __init__(self) -> None:
        self.estimates: dict[str, MemoryEstimate | BaseException] = {}
        self.loads: list[str] = []
        self._held: defaultdict[str, deque[HeldLoad]] = defaultdict(deque)

    def hold(self, model_id: str, error: BaseException | None = None, nbytes: int = 60) -> HeldLoad:
        """Let the next load of a model wait."""
        load = HeldLoad(error, nbytes)
        self._held[model_id].append(load)
        return load

    def prepare(
        self, model_id: str, error: BaseException | None = None, nbytes: int = 60
    ) -> HeldLoad:
        """Say how the next load of a model ends, without waiting."""
        load = self.hold(model_id, error, nbytes)
        load.release()
        return load

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        estimate = self.estimates.get(config.model_id, MemoryEstimate(100, 60))
        if isinstance(estimate, BaseException):
            raise estimate
        return estimate

    def load_from_config(self, config: ModelConfig, progress: LoadProgress | None = None) -> Any:
        self.loads.append(config.model_id)
        if not self._held[config.model_id]:
            self.prepare(config.model_id)
        return self._held[config.model_id].popleft().run(progress)


class Watch:
    """Notes every transition, and lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[TransitionEvent] = []
        self._news = asyncio.Event()

    def __call__(self, event: TransitionEvent) -> None:
        self.events.append(event)
        self._news.set()

    def moves(self, model_id: str) -> list[tuple[str | None, str | None]]:
        """Return the moves of one model."""
        return [(e.old, e.new) for e in self.events if e.model_id == model_id]

    async def until(self, model_id: str, state: str | None) -> TransitionEvent:
        """Wait for a model's next move into a state."""
        seen = len(self.events)
        async with asyncio.timeout(PATIENCE):
            while True:
                for event in self.events[seen:]:
                    if (event.model_id, event.new) == (model_id, state):
                        return event
                self._news.clear()
                await self._news.wait()
