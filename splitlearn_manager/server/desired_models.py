"""What should be loaded is what the configuration says: at the start, and when it has changed.

Each model is brought there on its own, so that one that takes long, or fails, keeps no other
waiting; a newer wish for the same model ends what an older one has begun.  Nothing is remembered
from one start of the daemon to the next.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from splitlearn_manager.core.entries import FailedEntry
from splitlearn_manager.core.states import ABSENT, ModelStatus, State
from splitlearn_manager.errors import ManagerError, ModelNotFoundError, ModelNotLoadingError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.config.changes import ConfigChanges
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import LoadingPlaceholder
    from splitlearn_manager.server.catalogue import Catalogue
    from splitlearn_manager.server.readiness import Readiness

logger = logging.getLogger(__name__)

_WANTED = frozenset({ModelStatus.LOADING, ModelStatus.READY})


class DesiredModels:
    """Brings a manager to what a catalogue says.

    Args:
        manager: Whose models they are.
        catalogue: What the configuration names.
        readiness: What is told where no load could be begun.
    """

    def __init__(
        self, manager: AsyncModelManager, catalogue: Catalogue, readiness: Readiness
    ) -> None:
        self._manager = manager
        self._catalogue = catalogue
        self._readiness = readiness
        self._steps: dict[str, asyncio.Task[None]] = {}

    async def preload(self) -> list[bool]:
        """Load what is to be loaded without anybody asking; return which of it is ready."""
        return await asyncio.gather(*map(self._load, self._catalogue.preloaded()))

    def follow(self, changes: ConfigChanges) -> None:
        """Begin to bring each model that has changed to what the catalogue now says."""
        for model_id in changes.removed:
            self._begin(model_id, self._drop(model_id))
        for config in (*changes.added, *changes.changed):
            self._begin(config.model_id, self._bring(config))
        for config in changes.adjusted:
            self._begin(config.model_id, self._adopt(config), cancels=False)
        for config in changes.unchanged:
            self._begin(config.model_id, self._mend(config), cancels=False)

    async def settled(self) -> None:
        """Wait until all that was begun has ended."""
        while self._steps:
            await asyncio.wait(self._steps.values())

    async def close(self) -> None:
        """Begin nothing more; what the manager is at is the manager's."""
        steps = list(self._steps.values())
        for step in steps:
            step.cancel()
        if steps:
            await asyncio.wait(steps)

    # --- One model's turn ------------------------------------------------------------------

    def _begin(
        self, model_id: str, step: Coroutine[Any, Any, None], *, cancels: bool = True
    ) -> None:
        """Take a step after the one that is under way for the same model."""
        earlier = self._steps.get(model_id)
        work = self._after(earlier, model_id, step, cancels=cancels)
        task = asyncio.create_task(work, name=f"bring model {model_id} to its configuration")
        self._steps[model_id] = task
        task.add_done_callback(lambda _: self._ended(model_id, task, step))

    def _ended(
        self, model_id: str, task: asyncio.Task[None], step: Coroutine[Any, Any, None]
    ) -> None:
        step.close()  # here, since a task that is cancelled before it begins never gets to it
        if self._steps.get(model_id) is task:
            del self._steps[model_id]

    async def _after(
        self,
        earlier: asyncio.Task[None] | None,
        model_id: str,
        step: Coroutine[Any, Any, None],
        *,
        cancels: bool,
    ) -> None:
        """Own a step: an error of the manager is told, and ends it."""
        try:
            if earlier is not None:
                if cancels:
                    await self._cancel(model_id)
                await asyncio.wait({earlier})
            await step
        except ManagerError as error:
            logger.error("model %s is not as configured: %s", model_id, error)  # noqa: TRY400

    # --- Steps -----------------------------------------------------------------------------

    async def _load(self, config: ModelConfig) -> bool:
        """Load a model, and return whether it is ready."""
        try:
            load = await self._manager.start_ensure(config)
        except ManagerError as error:
            logger.error("model %s was not loaded: %s", config.model_id, error)  # noqa: TRY400
            self._readiness.refused[config.model_id] = str(error)
            return False
        if load is None:
            self._readiness.awaited.discard(config.model_id)
            return True
        return await _outcome(load)

    async def _bring(self, config: ModelConfig) -> None:
        """Load a model that is new, or that must be loaded again, if it is wanted."""
        wanted = config.preload or await self._status(config.model_id) in _WANTED
        await self._cancel(config.model_id)
        status = await self._status(config.model_id)
        if status is ModelStatus.READY:
            begun = await self._manager.start_reload(config, config.reload)
            await _outcome(await asyncio.shield(begun))
            return
        if status is not ABSENT and not (wanted and status is ModelStatus.FAILED):
            await self._unload(config.model_id)
        if wanted:
            await self._load(config)

    async def _drop(self, model_id: str) -> None:
        """Drain and unload a model that is configured no more."""
        await self._cancel(model_id)
        await self._unload(model_id)

    async def _adopt(self, config: ModelConfig) -> None:
        """Let a model go on with what needs no load; load it if only now it is to be there."""
        if await self._status(config.model_id) is not ABSENT:
            await self._manager.adopt_config(config)
        elif config.preload:
            await self._load(config)

    async def _mend(self, config: ModelConfig) -> None:
        """Try again what failed: whoever edits the file may have mended what was wrong."""
        failed = await self._status(config.model_id) is ModelStatus.FAILED
        refused = config.model_id in self._readiness.refused
        if config.preload and (failed or refused):
            await self._load(config)

    async def _status(self, model_id: str) -> State:
        try:
            return (await self._manager.get_model_info(model_id)).status
        except ModelNotFoundError:
            return ABSENT

    async def _cancel(self, model_id: str) -> None:
        """End a load or reload under way, if there is one."""
        with suppress(ModelNotFoundError, ModelNotLoadingError):
            await self._manager.cancel_load(model_id, 0)

    async def _unload(self, model_id: str) -> None:
        """Unload a model, if it is there."""
        with suppress(ModelNotFoundError):
            await self._manager.unload_model(model_id)


async def _outcome(load: LoadingPlaceholder) -> bool:
    """Wait for the end of a load, and return whether the model is ready."""
    outcome = await load.outcome()
    if isinstance(outcome, FailedEntry):
        # The manager has logged where it came from.
        logger.error("model %s was not loaded: %s", outcome.model_id, outcome.load_error())
        return False
    return True
