"""What goes from part to part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from splitlearn_core.transfers import on_device

_NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class HiddenState:
    """A hidden state and the values that must go with it, which later parts can't compute.

    Parts of most architectures hand on the tensor alone; `splitlearn_core.side_values` says what
    goes with it in others.  It is passed on as it is: what a part returns, the next one takes.

    Attributes:
        tensor: [batch, new, …] as `SplitModel.hidden_shape` has the rest.
        side: Name -> tensor [batch, new, …], on the same device.
        positions: The new positions of the step, where the tensor holds but the last of them.
    """

    tensor: torch.Tensor
    side: Mapping[str, torch.Tensor] = field(default_factory=lambda: _NOTHING)
    positions: int | None = None

    @classmethod
    def of(cls, value: torch.Tensor | HiddenState) -> HiddenState:
        """Return what came from another part, in this form."""
        return value if isinstance(value, cls) else cls(value)  # type: ignore[arg-type]

    @property
    def handed_on(self) -> torch.Tensor | HiddenState:
        """What a part returns: the tensor itself, where nothing goes with it."""
        return self if self.side or self.positions is not None else self.tensor

    @property
    def new(self) -> int:
        """How many new positions the step has."""
        return self.tensor.shape[1] if self.positions is None else self.positions

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.tensor.device

    def to(self, device: torch.device | str | int) -> HiddenState:
        """Return it on another device.

        Raises:
            TypeError: A dtype was given: some of what goes along are whole numbers.
        """
        if isinstance(device, torch.dtype):
            raise TypeError("a HiddenState keeps its dtypes: parts agree in them")
        there = torch.device(device)
        side = {name: on_device(value, there) for name, value in self.side.items()}
        return replace(self, tensor=on_device(self.tensor, there), side=side)

    def detach(self) -> HiddenState:
        """Return it outside of any graph."""
        side = {name: value.detach() for name, value in self.side.items()}
        return replace(self, tensor=self.tensor.detach(), side=side)

    def rows(self, rows: slice) -> HiddenState:
        """Return some rows, with what goes with them."""
        return HiddenState(self.tensor[rows], {name: v[rows] for name, v in self.side.items()})

    def between(self, start: int, stop: int) -> HiddenState:
        """Return some positions, with what goes with them."""
        if (start, stop) == (0, self.shape[1]):
            return self
        side = {name: value[:, start:stop] for name, value in self.side.items()}
        return HiddenState(self.tensor[:, start:stop], side)

    def flat(self) -> HiddenState:
        """Return its rows one behind the other, as one row."""
        if self.shape[0] == 1:
            return self
        side = {name: value.flatten(0, 1)[None] for name, value in self.side.items()}
        return HiddenState(self.tensor.flatten(0, 1)[None], side)

    def unflat(self, rows: int) -> HiddenState:
        """Return its one row cut into so many of the same length."""
        if rows == 1:
            return self
        side = {name: _cut(value, rows) for name, value in self.side.items()}
        return HiddenState(_cut(self.tensor, rows), side)

    @staticmethod
    def joined(parts: Sequence[HiddenState], dim: int) -> HiddenState:
        """Return several as one: rows below each other (dim 0), or positions in a row (dim 1)."""
        if len(parts) == 1:
            return parts[0]
        side = {
            name: torch.cat([part.side[name] for part in parts], dim=dim) for name in parts[0].side
        }
        return HiddenState(torch.cat([part.tensor for part in parts], dim=dim), side)


def _cut(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return [1, rows x new, …] as [rows, new, …]."""
    return tensor.reshape(rows, -1, *tensor.shape[2:])
