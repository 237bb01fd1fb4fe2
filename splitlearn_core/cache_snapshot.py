"""What caches were before a forward that several sequences share, which may fail half-way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitlearn_core.cache import GhostLayer, PartCache

if TYPE_CHECKING:
    from collections.abc import Sequence


class CacheSnapshot:
    """The layers of some caches as they are; no tensor is copied.

    A layer writes behind what it holds, and what it held can still be seen where it was.

    Args:
        caches: Their ghosts are left out: they count when a forward is done.
    """

    def __init__(self, caches: Sequence[PartCache]) -> None:
        self._layers = [
            (layer, copied(layer))
            for cache in caches
            for layer in cache.layers
            if not isinstance(layer, GhostLayer)
        ]

    def restore(self) -> None:
        """Let every layer be what it was."""
        for layer, attributes in self._layers:
            layer.__dict__ = dict(attributes)  # at once: others ask it for its size


def copied(layer: Any) -> dict[str, Any]:
    """Return the attributes of a layer, as they are now."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(layer).items()
    }
