"""How the tensors of a Hugging Face model are made of those that a MiniMind file has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Made:
    """How a tensor of the Hugging Face model is made of stored ones.

    Attributes:
        groups: Names of stored tensors; those of a group are joined.
        stacked: Whether each group becomes one entry of a new first dimension.
        dim: Along which those of a group are joined.
        pairs_of: Heads whose rows are sorted from neighbouring pairs into halves; 0 for none.
    """

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False
    dim: int = 0
    pairs_of: int = 0

    @property
    def sources(self) -> Iterable[str]:
        """Every stored tensor that is needed."""
        return (name for group in self.groups for name in group)

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the shape that comes out."""
        joined = [list(shapes[group[0]]) for group in self.groups]
        for shape, group in zip(joined, self.groups, strict=True):
            shape[self.dim] = sum(shapes[name][self.dim] for name in group)
        return (len(joined), *joined[0]) if self.stacked else tuple(joined[0])


@dataclass(frozen=True)
class MiniMindModel:
    """A file as a Hugging Face model.

    Attributes:
        generation: 1, 2 or 3, as above.
        config: What its `config.json` would hold.
        tensors: The model's names -> how they are made.
        ignored: Stored tables that are computed.
    """

    generation: int
    config: dict[str, Any]
    tensors: dict[str, Made] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
