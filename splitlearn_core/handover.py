"""What a part is given: checked before a layer sees it, so that a message can say what is wrong.

Only names and shapes are looked at, never values: a step on a GPU does not wait for this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.hidden_state import HiddenState

if TYPE_CHECKING:
    from splitlearn_core.side_values import CrossingValue

_AS_IT_IS = "give it what the part before returned, as it is"


def check_ids(component: str, inputs: Any) -> None:
    """Check what a part with the embeddings is given.

    Raises:
        ValueError: It is no int64 (or int32) tensor [batch, new].
    """
    whole = isinstance(inputs, torch.Tensor) and inputs.dtype in {torch.int64, torch.int32}
    if not whole or inputs.ndim != 2:  # noqa: PLR2004 - [batch, new]
        raise ValueError(
            f"{component} takes input_ids, int64 [batch, new]; found {describe(inputs)}"
        )


@dataclass(frozen=True)
class Handover:
    """What a part takes that is not the first.

    Attributes:
        component: Its name.
        hidden_shape: Sizes of the hidden state after [batch, new].
        side: What must come with it.
    """

    component: str
    hidden_shape: tuple[int, ...]
    side: tuple[CrossingValue, ...]

    def check(self, inputs: Any) -> None:
        """Check what the part is given.

        Raises:
            ValueError: It is no hidden state, one of another model, or lacks what must go with it.
        """
        if not isinstance(inputs, (torch.Tensor, HiddenState)):
            raise ValueError(  # noqa: TRY004 - as for every bad argument of a forward
                f"{self.component} takes a hidden state, found {describe(inputs)}: {_AS_IT_IS}"
            )
        given = HiddenState.of(inputs)
        hidden = given.tensor
        fits = tuple(hidden.shape[2:]) == self.hidden_shape and hidden.is_floating_point()
        if hidden.ndim != 2 + len(self.hidden_shape) or not fits:
            sizes = ", ".join(map(str, self.hidden_shape))
            raise ValueError(
                f"{self.component} takes hidden states [batch, new, {sizes}], found"
                f" {describe(hidden)}: {_AS_IT_IS}"
            )
        self._check_side(given)

    def _check_side(self, given: HiddenState) -> None:
        """Check what comes with the tensor."""
        if missing := sorted({value.name for value in self.side} - given.side.keys()):
            raise ValueError(
                f"{self.component} needs {', '.join(missing)} besides the hidden state: {_AS_IT_IS}"
            )
        for value in self.side:
            found = given.side[value.name]
            if not _fits(value, found, given):
                raise ValueError(
                    f"{self.component} needs {value.name} as {value.describe()} for a hidden state"
                    f" {describe(given.tensor)}, found {describe(found)}: {_AS_IT_IS}"
                )


def _fits(value: CrossingValue, found: Any, given: HiddenState) -> bool:
    """Whether a side value has the shape that its part needs.

    One that counts layers may hold those of later parts too.
    """
    if not isinstance(found, torch.Tensor) or found.ndim != 2 + len(value.sizes):
        return False
    batch, new, *sizes = found.shape
    if batch != given.shape[0] or new not in {given.new, given.shape[1]}:
        return False
    if value.below is not None and found.is_floating_point():
        return False
    limits = list(value.sizes)
    if value.layerwise:
        own, count = limits.pop(0), sizes.pop(0)
        if own.most is not None and count < own.most:
            return False
    return all(limit.fits(size) for limit, size in zip(limits, sizes, strict=True))


def describe(value: Any) -> str:
    """Return dtype and shape of a tensor in words, or the name of another thing's type."""
    if isinstance(value, HiddenState):
        return f"a HiddenState with {describe(value.tensor)}"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
