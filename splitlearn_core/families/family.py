"""What the splitting rule must know of an architecture: data, never code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture.

    Module names are those of its own `…ForCausalLM` class in transformers.

    Attributes:
        layers: Path of the `ModuleList` that holds the decoder layers.
        embeddings: Modules that only the first part owns: they run before the layers.
        epilogue: Modules that only the last part owns: they run after the layers.
        unused: Modules that text never reaches (an image encoder, say): no part owns them.
        layer_count_key: Name in `config.json` of the number of layers.
        hidden_size_key: Name in `config.json` of the width of the hidden state.
        max_positions_key: Name in `config.json` of the longest sequence; empty where it has none.
        hidden_argument: Position (or name) of the hidden state among a layer's arguments.
        layer_returns: 0 where a layer returns the hidden state itself, else the length of the
            tuple that begins with it.
        cache_argument: Name of the forward's argument for the cache.
    """

    layers: str
    embeddings: tuple[str, ...]
    epilogue: tuple[str, ...]
    unused: tuple[str, ...] = ()
    layer_count_key: str = "num_hidden_layers"
    hidden_size_key: str = "hidden_size"
    max_positions_key: str = "max_position_embeddings"
    hidden_argument: int | str = 0
    layer_returns: int = 0
    cache_argument: str = "past_key_values"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Family:
        """Return the family that a JSON object describes."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {key: value for key, value in data.items() if key in known}
        for key, value in values.items():
            if isinstance(value, list):
                values[key] = tuple(value)
        return cls(**values)
