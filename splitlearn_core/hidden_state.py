"""What goes from part to part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

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

    def to(self, device: torch.device | str) -> HiddenState:
        """Return it on another device."""
        side = {name: value.to(device) for name, value in self.side.items()}
        return replace(self, tensor=self.tensor.to(device), side=side)

    def detach(self) -> HiddenState:
        """Return it outside of any graph."""
        side = {name: value.detach() for name, value in self.side.items()}
        return replace(self, tensor=self.tensor.detach(), side=side)
