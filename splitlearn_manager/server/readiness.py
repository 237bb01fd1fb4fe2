"""Whether the daemon should be given work, as its readiness probe says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_manager.core.states import ModelStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.model_info import ModelInfo


class Readiness:
    """Ready means: all that was to be loaded at the start is, and the daemon is not shutting down.

    A model that was unloaded on purpose does not make the daemon unready.

    Args:
        manager: Whose models count; asking it shows that its event loop is alive, too.
        expected: Ids of the models that are loaded at the start.

    Attributes:
        starting: Whether some of them may not yet be known to the manager.
        draining: Whether the daemon is shutting down.
        refused: Why the manager took up no load for a model, by its id: such a model has no entry.
    """

    def __init__(self, manager: AsyncModelManager, expected: Iterable[str] = ()) -> None:
        self.starting = False
        self.draining = False
        self.refused: dict[str, str] = {}
        self._manager = manager
        self._expected = tuple(expected)

    async def problem(self) -> str | None:
        """Return why the daemon is not ready, or `None` if it is."""
        if self.draining:
            return "the server is shutting down"
        models = {model.model_id: model for model in await self._manager.list_models()}
        for model_id in self._expected:
            if model_id in models and models[model_id].status in _UNREADY:
                return why_not_ready(models[model_id])
            if model_id in self.refused and model_id not in models:
                return f"model {model_id!r} was not loaded: {self.refused[model_id]}"
        return "models are still being loaded" if self.starting else None


_UNREADY = frozenset({ModelStatus.LOADING, ModelStatus.FAILED})


def why_not_ready(model: ModelInfo) -> str:
    """Return in words what keeps a model from being used: how far a load is, why it failed."""
    text = f"model {model.model_id!r} is {model.status.value}"
    if model.status is ModelStatus.FAILED:
        return f"model {model.model_id!r} failed to load: {model.error}"
    if model.status is ModelStatus.LOADING and model.bytes_total:
        return f"{text}, {model.bytes_done} of {model.bytes_total} bytes"
    return text
