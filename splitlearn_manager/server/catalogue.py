"""The models that the daemon's configuration names: what may be loaded, and from what."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

from splitlearn_manager.errors import ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from splitlearn_manager.config import ModelConfig


class Catalogue:
    """What the file says, by id, in its order; another file may take its place.

    Requests name a model of this list and nothing else: no path, no address, no configuration.
    """

    def __init__(self, models: Iterable[ModelConfig] = ()) -> None:
        self.models: dict[str, ModelConfig] = {}
        self.replace(models)

    def replace(self, models: Iterable[ModelConfig]) -> None:
        """Let another list hold."""
        self.models = {model.model_id: model for model in models}

    def config(self, model_id: str) -> ModelConfig:
        """Return what a model is loaded from.

        Raises:
            ModelNotFoundError: The configuration does not name it.
        """
        try:
            return self.models[model_id]
        except KeyError:
            names = ", ".join(self.models) or "none"
            raise ModelNotFoundError(
                f"the daemon's configuration has no model {reprlib.repr(model_id)}; it has: {names}"
            ) from None

    def preloaded(self) -> list[ModelConfig]:
        """Return what is to be loaded without anybody asking for it."""
        return [model for model in self.models.values() if model.preload]
