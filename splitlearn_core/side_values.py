"""What goes from part to part besides the hidden state, as a model's config has it.

`families/certified.json` says of an architecture which values those are; here their names, shapes
and dtypes are worked out for one part of one model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.families.family import CARRY, CONSTANT, LAYERWISE, SHARED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from splitlearn_core.families import Family
    from splitlearn_core.families.family import SideValue
    from splitlearn_core.plan import ComponentSpec

KEYS, VALUES = "keys", "values"
_AT_MOST = "<="


@dataclass(frozen=True)
class Size:
    """One size of a tensor.

    Attributes:
        most: The size itself, or the largest; `None` where any will do.
        exact: Whether it can't be less.
    """

    most: int | None
    exact: bool = True

    def fits(self, found: int) -> bool:
        """Whether a tensor may have `found`."""
        return self.most is None or found == self.most or (not self.exact and found < self.most)

    def __str__(self) -> str:
        if self.most is None:
            return "any"
        return str(self.most) if self.exact else f"up to {self.most}"


@dataclass(frozen=True)
class CrossingValue:
    """One tensor that goes with the hidden state, [batch, new, *sizes].

    Attributes:
        name: What it is called.
        dtype: Of its values, as `float32`.
        sizes: Its sizes after batch and new positions.
        reveals: What it tells whoever gets it, beyond what the hidden state does; may be empty.
        below: For token ids: how many there are; each is 0 or more, and less than that.
        layerwise: Whether the first of its sizes counts layers: those that it is for.
    """

    name: str
    dtype: str
    sizes: tuple[Size, ...]
    reveals: str
    below: int | None = None
    layerwise: bool = False

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes for each token, at most; `None` where there is no limit to be told."""
        most = [size.most for size in self.sizes]
        itemsize: int = getattr(torch, self.dtype).itemsize
        return None if None in most else math.prod(n for n in most if n is not None) * itemsize

    def describe(self) -> str:
        """Return dtype and shape in words: `int64 [batch, new]`."""
        return f"{self.dtype} [{', '.join(['batch', 'new', *map(str, self.sizes)])}]"


def hidden_sizes(family: Family, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the sizes of the hidden state after [batch, new]."""
    decoder = config.get_text_config(decoder=True)
    return tuple(_size(dim, decoder).most or 0 for dim in family.hidden_dims)


def hidden_dtype(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the hidden state, given that of the weights."""
    switch = family.hidden_dtype_switch
    off = switch and not getattr(config.get_text_config(decoder=True), switch)
    fixed: torch.dtype | None = None if off else getattr(torch, family.hidden_dtype or "-", None)
    return fixed or dtype


def received_values(
    family: Family, config: PreTrainedConfig, spec: ComponentSpec, dtype: torch.dtype
) -> tuple[CrossingValue, ...]:
    """Return what a part must be given besides the hidden state.

    Args:
        family: Its architecture.
        config: The whole model's.
        spec: The part.
        dtype: Of its weights.
    """
    if spec.is_first or not spec.num_layers:
        return ()
    found = [v for side in family.side for v in _received(side, config, spec, _name(dtype))]
    return tuple(value for value in found if _is_there(value))


def made_values(
    family: Family, config: PreTrainedConfig, spec: ComponentSpec, dtype: torch.dtype
) -> tuple[CrossingValue, ...]:
    """Return what a part makes besides the hidden state that a later one must be given.

    What a part that is not the first was given itself, and hands on, is left out.
    """
    decoder: Any = config.get_text_config(decoder=True)
    if spec.end_layer >= decoder.num_hidden_layers:
        return ()
    found = [v for side in family.side for v in _made(side, config, spec, _name(dtype))]
    return tuple(value for value in found if _is_there(value))


def shared_names(side: SideValue, key: str) -> tuple[str, str]:
    """Return what the keys and the values are called that layers of one kind share."""
    return f"{side.name}.{key}.{KEYS}", f"{side.name}.{key}.{VALUES}"


def _received(
    side: SideValue, config: PreTrainedConfig, spec: ComponentSpec, dtype: str
) -> Iterator[CrossingValue]:
    """Yield the tensors of one side value that a part needs."""
    decoder = config.get_text_config(decoder=True)
    if side.kind == SHARED:
        yield from _shared(side, decoder, range(spec.start_layer), _own(spec), dtype)
    elif side.kind == LAYERWISE:
        yield _crossing(side, decoder, dtype, Size(spec.num_layers, exact=True))
    elif side.kind != CARRY or spec.start_layer:
        yield _crossing(side, decoder, dtype)


def _made(
    side: SideValue, config: PreTrainedConfig, spec: ComponentSpec, dtype: str
) -> Iterator[CrossingValue]:
    """Yield the tensors of one side value that a part makes."""
    decoder: Any = config.get_text_config(decoder=True)
    later = range(spec.end_layer, decoder.num_hidden_layers)
    if side.kind == SHARED:
        yield from _shared(side, decoder, _own(spec), later, dtype)
    elif side.kind == CARRY:
        if spec.num_layers:
            yield _crossing(side, decoder, dtype)
    elif spec.is_first:
        layers = (Size(len(later)),) if side.kind == LAYERWISE else ()
        yield _crossing(side, decoder, dtype, *layers)


def _own(spec: ComponentSpec) -> range:
    """Return the numbers of a part's layers."""
    return range(spec.start_layer, spec.end_layer)


def _shared(
    side: SideValue, decoder: Any, before: range, after: range, dtype: str
) -> Iterator[CrossingValue]:
    """Yield the keys and values that some layers leave for others: [batch, new, heads, size]."""
    modes = decoder.kv_sharing_modes
    wanted = {decoder.layer_types[n] for n in after if modes[n] == "reuse"}
    for number in before:
        key = decoder.layer_types[number]
        if modes[number] == "store" and key in wanted:
            sizes = _heads(decoder, number)
            for name in shared_names(side, key):
                yield CrossingValue(name, side.dtype or dtype, sizes, side.reveals)


def _heads(decoder: Any, number: int) -> tuple[Size, Size]:
    """Return the number of key-value heads of a layer, and their size."""
    each = getattr(decoder, "per_layer_config", None)
    layer = each[number] if each else decoder
    return Size(layer.num_key_value_heads), Size(layer.head_dim)


def _crossing(side: SideValue, decoder: Any, dtype: str, *first: Size) -> CrossingValue:
    """Return one tensor of a side value."""
    sizes = tuple(_size(dim, decoder) for dim in side.dims)
    ids = side.kind == CONSTANT and side.dtype.startswith("int")
    below = int(decoder.vocab_size) if ids else None
    return CrossingValue(
        side.name,
        side.dtype or dtype,
        (*first, *sizes),
        side.reveals,
        below,
        side.kind == LAYERWISE,
    )


def _size(dim: str, decoder: Any) -> Size:
    """Return the size that a config gives to one of `Family.hidden_dims`."""
    if not dim:
        return Size(None, exact=False)
    factors = [int(getattr(decoder, name)) for name in dim.removeprefix(_AT_MOST).split("*")]
    return Size(math.prod(factors), exact=not dim.startswith(_AT_MOST))


def _is_there(value: CrossingValue) -> bool:
    """Whether a model has a value at all: configs turn some off by a size of 0."""
    return all(size.most != 0 for size in value.sizes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
