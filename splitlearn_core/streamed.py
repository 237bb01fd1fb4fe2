"""The unsplit model, one layer in memory at a time: what parts are compared with where it is large.

It is transformers' own `…ForCausalLM`, on the meta device but for its ends.  Each decoder layer
gets its weights just before its forward (or its backward) needs them, and gives them up when
another layer's turn comes.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitlearn_core.builder import draw
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.loading.materialize import PartReads, materialize
from splitlearn_core.plan import FULL, SplitPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedConfig

    from splitlearn_core.families import Family
    from splitlearn_core.loading.materialize import Placement
    from splitlearn_core.loading.sources import TensorSource

_ENDS = -1


class StreamedModel:
    """The unsplit model of a checkpoint, which stays open.

    Memory: embeddings, head and what else lies outside of the layers; one layer; and `kept`.

    Attributes:
        model: transformers' model; call it as always, in one thread.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_layers: int,
        source: TensorSource,
        placement: Placement,
        *,
        checkpoint: str,
        family: Family,
        kept: Iterable[str] = (),
    ) -> None:
        """Load what lies outside of the layers.

        Args:
            config: The whole model's.
            num_layers: How many decoder layers it has.
            source: Where the tensors are.
            placement: Device and dtype.
            checkpoint: Names the source in errors.
            family: How the architecture is built.
            kept: Parameters that stay in memory, for the gradients that they will have.

        Raises:
            CheckpointError: The checkpoint is damaged or incomplete.
        """
        whole = SplitPlan.whole(num_layers).component(FULL)
        blueprint = draw(config, whole, source, checkpoint, family, placement.dtype)
        self.model = blueprint.model
        self._source = source
        self._placement = placement
        layers = family.layers
        self._groups = _group_by_layer(blueprint.reads, layers, set(kept))
        self._held = _ENDS
        self._load(_ENDS)
        self.model.config.dtype = dtype_name(blueprint.reads.dtype)
        for number, layer in enumerate(self.model.get_submodule(layers).children()):
            layer.register_forward_pre_hook(lambda *_, number=number: self._hold(number))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights: of the embedding, where they differ."""
        return next(p.dtype for p in self.model.get_input_embeddings().parameters())

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Let backward ask for a layer's weights again, in the place of keeping all of them."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _hold(self, number: int) -> None:
        """Have the weights of one layer here, and of no other."""
        if self._held == number:
            return
        if self._held != _ENDS:
            self._forget(self._held)
        self._load(number)
        self._held = number

    def _load(self, number: int) -> None:
        """Read the weights of a layer, or of the ends."""
        materialize(self.model, self._groups[number], self._source, self._placement)

    def _forget(self, number: int) -> None:
        """Put weights on the meta device again.

        The graph of a forward that backward is to follow holds on to the parameters themselves, so
        their memory is taken from them.
        """
        for target in self._groups[number].recipes:
            path, _, name = target.rpartition(".")
            module = self.model.get_submodule(path)
            held = _slot(self.model, target)
            empty = torch.empty_like(held, device="meta")
            held.data = held.new_empty(0)
            if name in module._parameters:  # noqa: SLF001 - as `materialize` puts them there
                wants = held.requires_grad
                module._parameters[name] = nn.Parameter(empty, requires_grad=wants)  # noqa: SLF001
            else:
                module._buffers[name] = empty  # noqa: SLF001

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Later:
        """Note whose weight it is that backward will need, where it is one."""
        if self._held == _ENDS:
            return tensor
        for target in self._groups[self._held].recipes:
            weight = _slot(self.model, target)
            offset = tensor.data_ptr() - weight.data_ptr()
            if weight.dtype == tensor.dtype and 0 <= offset < weight.nbytes:
                offset //= weight.itemsize
                return _Later(self._held, target, tensor.size(), tensor.stride(), offset)
        return tensor

    def _unpack(self, packed: torch.Tensor | _Later) -> torch.Tensor:
        """Return the weight, its layer read again if need be."""
        if isinstance(packed, torch.Tensor):
            return packed
        self._hold(packed.layer)
        weight = _slot(self.model, packed.target).detach()
        offset = weight.storage_offset() + packed.offset
        return weight.as_strided(packed.size, packed.stride, offset)


@dataclass(frozen=True)
class _Later:
    """A view of a layer's weight, in the form in which the graph keeps it."""

    layer: int
    target: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _slot(model: nn.Module, target: str) -> torch.Tensor:
    """Return a parameter or buffer by its name."""
    path, _, name = target.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), name)
    return tensor


def _group_by_layer(reads: PartReads, layers: str, kept: set[str]) -> dict[int, PartReads]:
    """Sort what is to be read by the layer that needs it; the ends and what is kept are -1."""
    pattern = re.compile(re.escape(layers) + r"\.(\d+)\.")
    groups: dict[int, dict[str, Any]] = {_ENDS: {}}
    for target, recipe in reads.recipes.items():
        match = pattern.match(target)
        number = int(match[1]) if match and target not in kept else _ENDS
        groups.setdefault(number, {})[target] = recipe
    return {number: _some(reads, recipes) for number, recipes in groups.items()}


def _some(reads: PartReads, recipes: dict[str, Any]) -> PartReads:
    """Return a part of what is to be read."""
    names = {name for recipe in recipes.values() for name in recipe.stored}
    stored = {name: reads.stored[name] for name in reads.stored if name in names}
    return PartReads(recipes, stored, reads.ties, reads.dtype)
