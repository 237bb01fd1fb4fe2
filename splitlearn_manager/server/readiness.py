"""Whether the daemon should be given work, as its readiness probe says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import LoadCancelledError
from splitlearn_manager.server.model_state import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.events import TransitionEvent
    from splitlearn_manager.server.catalogue import Catalogue


class Readiness:
    """Ready means: what should be loaded is, and the daemon is not shutting down.

    What should be loaded is what the configuration names with `preload`.  Once such a model has
    been ready, it may be reloaded, unloaded on purpose, or go because nobody uses it, and loaded
    again: none of that makes the daemon unready.  What does is one whose load failed, until it is
    loaded, or taken out of the manager.  A model that is not preloaded is for whoever loads it, and
    has a readiness of its own: whoever balances load must not lose the whole daemon over it.

    Args:
        manager: Whose models count; asking it shows that its event loop is alive, too.
        catalogue: Which of them are configured.

    Attributes:
        draining: Whether the daemon is shutting down.
        refused: Why the manager took up no load for a model, by its id: such a model has no entry.
        awaited: Ids of models without which the daemon is not ready.
    """

    def __init__(self, manager: AsyncModelManager, catalogue: Catalogue) -> None:
        self.draining = False
        self.refused: dict[str, str] = {}
        self.awaited = {model.model_id for model in catalogue.preloaded()}
        self._manager = manager
        self._catalogue = catalogue

    def model_moved(self, event: TransitionEvent) -> None:
        """Note what a model's move means; an observer of the manager's transitions."""
        self.refused.pop(event.model_id, None)
        failed = event.new is ModelStatus.FAILED and event.code != LoadCancelledError.code
        configured = self._catalogue.models.get(event.model_id)
        if failed and configured is not None and configured.preload:
            self.awaited.add(event.model_id)
        elif event.new is not ModelStatus.LOADING:
            self.awaited.discard(event.model_id)

    def forget(self, model_ids: Iterable[str]) -> None:
        """Wait for models no more that are not configured any more."""
        for model_id in model_ids:
            self.refused.pop(model_id, None)
            self.awaited.discard(model_id)

    async def problem(self) -> str | None:
        """Return why the daemon is not ready, or `None` if it is."""
        if self.draining:
            return "the server is shutting down"
        models = {model.model_id: model for model in await self._manager.list_models()}
        for model_id in self._catalogue.models:
            if model_id in self.refused:
                return f"model {model_id!r} was not loaded: {self.refused[model_id]}"
            if model_id in self.awaited:
                model = models.get(model_id)
                return f"model {model_id!r} is waiting" if model is None else reason_of(model)
        return None
