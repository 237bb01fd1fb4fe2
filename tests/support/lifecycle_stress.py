"""Many tasks at one model: loads, unloads, reloads and requests, none of which may be lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from lifecycle_storm.loader import StormLoader
from lifecycle_storm.watchdog import Watchdog

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.config import ModelConfig
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.errors import ManagerError, ModelFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.core.events import TransitionEvent

_SPLIT = {"component": "trunk", "split_points": [2, 6]}
_BLOCKED = 1.0
_LONGEST = 30.0
_BACK_OFF = 0.001
# What somebody may be told who wants a model that others load and unload.
_TOLD = frozenset(
    {
        "model_already_loaded",
        "model_loading",
        "model_unloading",
        "model_not_found",
    }
)
CONFIG = ModelConfig("a", "nowhere", config=_SPLIT)


class FlakyLoader(StormLoader):
    """Fails as often as it is told to, but never the first time."""

    def __init__(self, share: float, seed: int) -> None:
        super().__init__({"a": MemoryEstimate(100, 60)})
        self.failed = 0
        self._loads = 0
        self._share = share
        self._rng = random.Random(seed)  # noqa: S311 - no secret

    def load_from_config(self, config: ModelConfig, progress: Any = None) -> Any:
        self._loads += 1
        if self._loads > 1 and self._rng.random() < self._share:
            self.failed += 1
            raise OSError("the disk, just now")
        return super().load_from_config(config, progress)


class Stress:
    """One manager with one model, and what became of everything that was asked of it.

    Attributes:
        wrong: What should not have been.
        served: Requests that were answered, and rightly.
        told: How often a request or an operation was told why not, by the word for it.
        moves: How often the model went from one state to another.
    """

    def __init__(self, share: float = 0.0, seed: int = 0) -> None:
        self.loader = FlakyLoader(share, seed)
        self.manager = AsyncModelManager(
            ResourceManager(memory_limit=1000), loader=self.loader, single_threaded=False
        )
        self.manager.on_transition.append(self._note)
        self.wrong: list[str] = []
        self.served = 0
        self.told: Counter[str] = Counter()
        self.moves: Counter[tuple[str | None, str | None]] = Counter()
        self._over = asyncio.Event()
        self._before = asyncio.all_tasks()

    def _note(self, event: TransitionEvent) -> None:
        self.moves[event.old, event.new] += 1

    async def pairs(self, tasks: int, times: int) -> None:
        """Load and unload the model, so many times in each of so many tasks."""

        async def pair(number: int) -> None:
            load = self.manager.ensure_model if number % 2 else self.manager.load_model
            for _ in range(times):
                await self._ask(lambda: load(CONFIG), _TOLD)
                await self._ask(lambda: self.manager.unload_model("a"), _TOLD)

        await self._under_requests(pair, tasks, _TOLD)

    async def reloads(self, times: int, requesters: int = 8) -> None:
        """Reload the model so many times, some of them in vain, while nobody may be refused."""
        await self.manager.ensure_model(CONFIG)

        async def reload(_: int) -> None:
            for _ in range(times):
                try:
                    await self.manager.reload_model(CONFIG)
                except ModelFailedError:
                    self.told["reload failed"] += 1

        await self._under_requests(reload, 1, frozenset(), requesters)

    async def _under_requests(
        self,
        work: Callable[[int], Any],
        tasks: int,
        allowed: frozenset[str],
        requesters: int = 4,
    ) -> None:
        """Do it while requests come, and look whether the manager answers throughout."""
        async with Watchdog(_BLOCKED) as watchdog:
            asking = [asyncio.create_task(self._request(n, allowed)) for n in range(requesters)]
            looking = asyncio.create_task(self._look())
            await asyncio.gather(*(work(number) for number in range(tasks)))
            self._over.set()
            await asyncio.gather(*asking, looking)
            await asyncio.wait_for(self.manager.shutdown(), _LONGEST)
        self.wrong += watchdog.blocked
        self._check_end()

    async def _request(self, number: int, allowed: frozenset[str]) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            question = (number, count)

            async def ask(question: tuple[int, int] = question) -> None:
                answer = await self.manager.infer("a", question)
                if answer != question:
                    self.wrong.append(f"{question} was answered with {answer}")
                self.served += 1

            await self._ask(ask, allowed)
            await asyncio.sleep(0)

    async def _ask(self, ask: Callable[[], Any], allowed: frozenset[str]) -> None:
        """Ask for something, and note what became of it."""
        try:
            answer = await asyncio.wait_for(ask(), _LONGEST)
        except ManagerError as error:
            self.told[error.code] += 1
            if error.code not in allowed:
                self.wrong.append(repr(error))
            await asyncio.sleep(_BACK_OFF)
        except Exception as error:  # noqa: BLE001 - it is wrong, whatever it is
            self.wrong.append(repr(error))
        else:
            if answer is False:
                self.wrong.append("an unload whose memory is not back")

    async def _look(self) -> None:
        while not self._over.is_set():
            await self.manager.check_alive(1.0)
            infos = await self.manager.list_models()
            if len(infos) > 1:
                self.wrong.append(f"{infos}")
            await asyncio.sleep(0.002)

    def _check_end(self) -> None:
        usage = self.manager.resource_manager.get_current_usage()
        if usage.reserved_bytes:
            self.wrong.append(f"left over: {usage}")
        if left := asyncio.all_tasks() - self._before:
            self.wrong.append(f"left over: {left}")
        if not self.served:
            self.wrong.append("no request was served at all")
