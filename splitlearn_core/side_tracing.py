"""Find out what layers are given besides the hidden state that depends on the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.families.family import CARRY, CONSTANT, LAYERWISE, SHARED, SideValue
from splitlearn_core.watching import LayerCall, NotAChainError, Trace

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_TOKENS = "the tokens themselves"
_LOOKED_UP = "the tokens themselves: it is computed from each of them alone, and can be looked up"

# Sizes of other things, which a size of a tensor may equal by chance.
_OTHERS = ("_id", "vocab", "layers", "heads", "experts", "window", "position")


@dataclass(frozen=True)
class Sizes:
    """Tells where a tensor's sizes come from.

    Attributes:
        config: The decoder's.
        shape: Rows and positions of the input.
    """

    config: PreTrainedConfig
    shape: tuple[int, ...]

    def around(self, tensor: torch.Tensor, what: str) -> tuple[int, tuple[int, ...]]:
        """Return the axis of the batch, which positions follow, and the other sizes.

        Raises:
            NotAChainError: The tensor has no such axes; `what` names it.
        """
        shape = tuple(tensor.shape)
        for axis in (0, 1):
            if shape[axis : axis + 2] == tuple(self.shape):
                return axis, shape[:axis] + shape[axis + 2 :]
        raise NotAChainError(f"the {what} is not [batch, positions, ...] but {list(shape)}")

    def name(self, size: int, what: str) -> str:
        """Return the config's name for a size: of a field, or of a product with `hidden_size`.

        Raises:
            NotAChainError: It has none; `what` names the tensor.
        """
        hidden = getattr(self.config, "hidden_size", None)
        if size == hidden:
            return "hidden_size"
        if found := self._find(size):
            return found
        if hidden and size % hidden == 0 and (found := self._find(size // hidden)):
            return f"{found}*hidden_size"
        raise NotAChainError(f"its config does not say why {what} has a size of {size}")

    def _find(self, size: int) -> str:
        """Return the one field of the config that has this value, or nothing."""
        fields = [key for key, value in self.config.to_dict().items() if value == size]
        plain = [key for key in fields if type(getattr(self.config, key, None)) is int]
        telling = [key for key in plain if not any(word in key for word in _OTHERS)]
        return telling[0] if len(telling) == 1 else ""


def find_side_values(
    first: Trace,
    second: Trace,
    third: Trace | None,
    hidden_argument: int | str,
    layers: nn.Module,
    sizes: Sizes,
) -> tuple[SideValue, ...]:
    """Return the arguments of layers, but for the hidden state, that depend on the tokens.

    Args:
        first: Of a float32 model.
        second: Of the same, with other tokens.
        third: Of fewer positions, in bfloat16; `None` where that could not be had.
        hidden_argument: Where the hidden state is.
        layers: The list of layers.
        sizes: Of the first trace's input.

    Raises:
        NotAChainError: One is neither made before the layers nor handed from layer to layer.
    """
    names = list(inspect.signature(next(layers.children()).forward).parameters)
    found = _that_differ(first, second, hidden_argument)
    return tuple(
        _side_value(key, names[key] if isinstance(key, int) else key, first, third, sizes)
        for key in sorted(found, key=str)
    )


def _that_differ(first: Trace, second: Trace, hidden_argument: int | str) -> set[int | str]:
    """Return the arguments that other tokens change."""
    return {
        key
        for one, other in zip(first.calls, second.calls, strict=True)
        for key, value in one.arguments.items()
        if key != hidden_argument and not _same(value, other.arguments.get(key))
    }


def _side_value(
    key: int | str, name: str, first: Trace, third: Trace | None, sizes: Sizes
) -> SideValue:
    """Describe one value."""
    values = [call.arguments.get(key) for call in first.calls]
    if isinstance(values[0], Mapping):
        return _shared(key, name, values, sizes)
    carried = _carried(key, first.calls)
    tensors = [v for v in values[1 if carried else 0 :] if isinstance(v, torch.Tensor)]
    if not tensors or len(tensors) < len(values) - bool(carried):
        raise NotAChainError(f"its layers need more than the hidden state: {name}")
    kind = CARRY if carried else _premade(tensors, name)
    shorter = _tensor_of(third, key)
    return SideValue(
        name=name,
        kind=kind,
        argument=key,
        output=carried,
        dtype=_dtype(tensors[-1], shorter),
        dims=tuple(_dims(tensors[-1], shorter, name, sizes)),
        reveals="" if carried else _TOKENS if not tensors[0].is_floating_point() else _LOOKED_UP,
    )


def _shared(key: int | str, name: str, values: list[Any], sizes: Sizes) -> SideValue:
    """Describe the dict in which layers leave keys and values for others."""
    one = all(value is values[0] for value in values)
    if not one or not hasattr(sizes.config, "kv_sharing_modes"):
        raise NotAChainError(f"its layers share more than keys and values: {name}")
    return SideValue(name=name, kind=SHARED, argument=key)


def _carried(key: int | str, calls: list[LayerCall]) -> int:
    """Return where in what a layer returns the next one's argument is; 0 where it is not there."""
    places = {_place(before.output, call.arguments.get(key)) for before, call in pairwise(calls)}
    return places.pop() if len(places) == 1 else 0


def _place(output: Any, value: Any) -> int:
    """Return the position of a value in what a layer returned, 0 for nowhere."""
    returned = output if isinstance(output, (tuple, list)) else ()
    return next((n for n, item in enumerate(returned) if n and item is value is not None), 0)


def _premade(tensors: list[torch.Tensor], name: str) -> str:
    """Tell a value that all layers are given from one that was made for each.

    Raises:
        NotAChainError: It is neither.
    """
    if all(torch.equal(value, tensors[0]) for value in tensors):
        return CONSTANT
    if len({value.untyped_storage().data_ptr() for value in tensors}) == 1:
        return LAYERWISE
    raise NotAChainError(f"its layers need more than the hidden state: {name}")


def _tensor_of(trace: Trace | None, key: int | str) -> torch.Tensor | None:
    """Return the same value in another trace."""
    value = trace.calls[-1].arguments.get(key) if trace else None
    return value if isinstance(value, torch.Tensor) else None


def _dtype(tensor: torch.Tensor, other: torch.Tensor | None) -> str:
    """Return a value's own dtype; nothing where it is that of the weights."""
    found = tensor.dtype if other is None else other.dtype
    follows = found is torch.bfloat16 or (other is None and found.is_floating_point)
    return "" if follows else str(found).removeprefix("torch.")


def _dims(
    tensor: torch.Tensor, other: torch.Tensor | None, name: str, sizes: Sizes
) -> Iterator[str]:
    """Yield the names of a value's sizes after [batch, new].

    One that shrinks with the input is a limit, if the config names it, and free if not.
    """
    axis, rest = sizes.around(tensor, name)
    if axis:
        raise NotAChainError(f"{name} is not [batch, positions, ...] but {list(tensor.shape)}")
    shorter = rest if other is None else tuple(other.shape)[2:]
    for size, small in zip(rest, shorter, strict=True):
        if size == small:
            yield sizes.name(size, name)
        else:
            yield _limit(size, name, sizes)


def _limit(size: int, name: str, sizes: Sizes) -> str:
    """Return the name of the limit of a size that the input can keep below it."""
    try:
        return f"<={sizes.name(size, name)}"
    except NotAChainError:
        return ""


def _same(one: Any, other: Any) -> bool:
    """Whether the tensors in two values are equal."""
    ours, theirs = list(_tensors(one)), list(_tensors(other))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
