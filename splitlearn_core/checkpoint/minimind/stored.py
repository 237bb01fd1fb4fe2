"""The tensors of one MiniMind file: which there are, and what their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Collection

from splitlearn_core.checkpoint.minimind.made import Shapes
from splitlearn_core.checkpoint.minimind.tensor_names import (
    LAYER,
    LORA_FACTOR,
    TABLES,
    hugging_face_name,
    is_minimind,
)
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed


class StoredTensors:
    """The tensors of one file, by Hugging Face's names.

    Attributes:
        where: Names the file in errors.
        is_first: Whether they are generation 1's.
        names: Hugging Face's names -> the stored ones.
        ignored: Stored tables that are computed.
    """

    def __init__(self, shapes: Shapes, where: str) -> None:
        self._shapes = shapes
        self.where = where
        self.ignored = tuple(sorted(name for name in shapes if TABLES.search(name)))
        own = [name for name in shapes if not TABLES.search(name)]
        _check(own, where)
        self.is_first = "tok_embeddings.weight" in shapes
        rename = hugging_face_name if self.is_first else str
        self.names: dict[str, str] = {rename(name): name for name in own}

    def has(self, name: str) -> bool:
        """Whether the first layer has such a tensor."""
        return f"model.layers.0.{name}" in self.names

    @property
    def has_norms(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.has("self_attn.q_norm.weight")

    @property
    def is_moe(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.has("mlp.gate.weight")

    @property
    def generation(self) -> int:
        """1, 2 or 3."""
        return 1 if self.is_first else 3 if self.has_norms else 2

    def shape(self, name: str, dimensions: int = 2) -> tuple[int, ...]:
        """Return a tensor's shape, which must have so many dimensions."""
        stored = self.names.get(name)
        if stored is None:
            raise CheckpointError(f"{self.where} lacks {name}, which every MiniMind model has")
        shape = self._shapes[stored]
        if len(shape) != dimensions or not all(shape):
            raise CheckpointError(f"{self.where}: {stored} has the shape {list(shape)}")
        return shape

    def at(self, name: str) -> str:
        """Return the stored name of a tensor that must be there."""
        if name not in self.names:
            raise CheckpointError(f"{self.where} lacks {name}, which its other experts have")
        return self.names[name]

    def count_layers(self) -> int:
        """Return the number of layers, which must be there without a gap."""
        numbers = {int(m[1]) for name in self.names if (m := LAYER.fullmatch(name))}
        if numbers != set(range(len(numbers))):
            absent = sorted(set(range(max(numbers, default=0))) - numbers)
            raise CheckpointError(f"{self.where} lacks layers {', '.join(map(str, absent))}")
        return len(numbers)

    def width(self) -> int:
        """Return the width within a layer's MLP, or an expert's."""
        path = "mlp.experts.0" if self.is_moe else "mlp"
        return self.shape(f"model.layers.0.{path}.gate_proj.weight")[0]

    def count_shared(self) -> int:
        """Return the number of experts that every token passes."""
        if self.has("mlp.shared_experts.gate_proj.weight"):
            return 1
        pattern = re.compile(r"model\.layers\.0\.mlp\.shared_experts\.\d+\.gate_proj\.weight")
        return sum(pattern.fullmatch(name) is not None for name in self.names)


def _check(names: Collection[str], where: str) -> None:
    """Refuse tensors that are no MiniMind model's."""
    if any(name.endswith(LORA_FACTOR) for name in names):
        raise CheckpointError(
            f"{where} is a LoRA adapter, no model: load its model, and then the adapter"
            " (splitlearn_core.checkpoint.load_lora)"
        )
    if not is_minimind(names):
        raise CheckpointError(
            f"{where} is no MiniMind model: it has neither tok_embeddings and"
            " layers.N.attention.wq nor model.embed_tokens and model.layers.N.self_attn.q_proj;"
            f" it has {listed(names, 6)}"
        )
