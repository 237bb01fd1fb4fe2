"""What the splitting rule must know of an architecture: data, never code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

CONSTANT = "constant"
LAYERWISE = "layerwise"
CARRY = "carry"
SHARED = "shared"


@dataclass(frozen=True)
class SideValue:
    """A value besides the hidden state that layers are given, and that depends on the tokens.

    Attributes:
        name: The layers' own name for it.
        kind: `constant`: made before the layers, the same for all of them.  `layerwise`: made
            before the layers, for each of them another.  `carry`: returned by a layer, and given
            to the next.  `shared`: a dict in which some layers leave their keys and values for
            later ones, by the kind of layer (transformers' `kv_sharing_modes`).
        argument: Its position (or name) among a layer's arguments.
        output: Its position in what a layer returns, for a `carry`.
        dtype: Its dtype; empty for that of the weights.
        dims: Its sizes, from the third on ([batch, new, …]; for `layerwise` without the layers), as
            `Family.hidden_dims` has them.
        reveals: What it tells whoever gets it, beyond what the hidden state does; may be empty.
    """

    name: str
    kind: str
    argument: int | str
    output: int = 0
    dtype: str = ""
    dims: tuple[str, ...] = ()
    reveals: str = ""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Module names are those of its own `…ForCausalLM` class in transformers.

    Attributes:
        layers: Path of the `ModuleList` that holds the decoder layers.
        embeddings: Modules that only the first part owns: they run before the layers.
        epilogue: Modules that only the last part owns: they run after the layers.
        unused: Modules that text never reaches (an image encoder, say): no part owns them.
        layer_count_key: Name in `config.json` of the number of layers, or of a list that has an
            item for each of them.
        hidden_size_key: Name in `config.json` of the width of the hidden state.
        max_positions_key: Name in `config.json` of the longest sequence; empty where it has none.
        hidden_argument: Position (or name) of the hidden state among a layer's arguments.
        layer_returns: 0 where a layer returns the hidden state itself, else the length of the
            tuple that begins with it.
        cache_argument: Name of the forward's argument for the cache.
        batch_axis: Axis of the batch in the hidden state that layers are given; positions follow.
        hidden_dims: The other sizes of the hidden state: names of fields of the config, or products
            of two of them (`a*b`); `<=a` is for a size of at most that, nothing for any size.
        hidden_dtype: Dtype of the hidden state; empty for that of the weights.
        hidden_dtype_switch: Field of the config without which it is that of the weights after all;
            empty where there is none.
        side: What layers are given besides the hidden state.
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
    batch_axis: int = 0
    hidden_dims: tuple[str, ...] = ("hidden_size",)
    hidden_dtype: str = ""
    hidden_dtype_switch: str = ""
    side: tuple[SideValue, ...] = ()

    @property
    def masks_new_only(self) -> bool:
        """Whether the forward takes the mask of the new positions alone: no layer attends.

        transformers calls the cache of such models `cache_params`.
        """
        return self.cache_argument == "cache_params"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Family:
        """Return the family that a JSON object describes."""
        side = tuple(SideValue(**_values(SideValue, value)) for value in data.get("side", ()))
        return cls(**_values(cls, data) | {"side": side})

    def to_dict(self) -> dict[str, Any]:
        """Return what is not the default, for JSON."""
        side = {"side": [_not_default(value) for value in self.side]} if self.side else {}
        return _not_default(self) | side


def _values(kind: type[Family | SideValue], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a class that a JSON object has, lists as tuples."""
    known = {field.name for field in fields(kind)}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in data.items()
        if key in known
    }


def _not_default(value: Family | SideValue) -> dict[str, Any]:
    """Return the fields that are not the default, tuples as lists."""
    found = {field: getattr(value, field.name) for field in fields(value)}
    return {
        field.name: list(content) if isinstance(content, tuple) else content
        for field, content in found.items()
        if field.default is MISSING or content != field.default
    }
