"""How much memory a part will take: pure values; `factory.estimate_component` has the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_core.loading.ahead import AT_ONCE

if TYPE_CHECKING:
    from splitlearn_core.builder import Blueprint
    from splitlearn_core.loading.materialize import Placement
    from splitlearn_core.loading.packing import PackingPlan
    from splitlearn_core.loading.sources import StoredTensor


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a load needs.

    Mapped weights count fully, whether their pages are touched or not.

    Attributes:
        peak_bytes: At the worst moment of the load, its first forward included.
        steady_bytes: Once it is done.
        warm_up_bytes: What that forward takes beside the weights; 0 where there is none.
    """

    peak_bytes: int
    steady_bytes: int
    warm_up_bytes: int = 0

    def __add__(self, other: MemoryEstimate) -> MemoryEstimate:
        """Return the estimate of both, loaded one after the other, then warmed up together."""
        steady = self.steady_bytes + other.steady_bytes
        warm_up = self.warm_up_bytes + other.warm_up_bytes
        loading = max(self.peak_bytes, self.steady_bytes + other.peak_bytes)
        return MemoryEstimate(max(loading, steady + warm_up), steady, warm_up)


def estimate_part(
    blueprint: Blueprint,
    placement: Placement,
    packing: PackingPlan | None = None,
    warm_up_positions: int = 0,
    cache_nbytes: int = 0,
) -> MemoryEstimate:
    """Add up what a part will take: stored tensors once they are placed, and computed ones.

    A stored tensor counts once, however many of the model's tensors it gives values to.  Tables are
    computed when the stored ones have passed.  What is packed passes through twice: as it is
    stored, and, where that is another dtype, as it is computed with.

    Args:
        blueprint: The part.
        placement: Device, and whether weights may stay mapped.
        packing: Which layers are packed.
        warm_up_positions: Positions of a forward that belongs to the load; 0 for none.
        cache_nbytes: Bytes of caches for which memory is taken with it.
    """
    stored = blueprint.reads.stored
    packed = packing.stored if packing is not None else frozenset()
    layers = packing.layers.values() if packing is not None else ()
    kept = [tensor for name, tensor in stored.items() if name not in packed]
    steady = sum(tensor.final_nbytes for tensor in kept) + blueprint.tables_nbytes
    steady += sum(layer.nbytes for layer in layers)
    steady += cache_nbytes
    passing = [tensor.nbytes for tensor in kept if placement.copies(tensor)]
    passing += [_passing(stored[name]) for name in packed]
    most = max(AT_ONCE * max(passing, default=0), blueprint.making_nbytes)
    most += max((layer.scratch for layer in layers), default=0)
    warm_up = 0
    if warm_up_positions:
        from splitlearn_core.activations import forward_nbytes  # noqa: PLC0415 - imports torch

        warm_up = forward_nbytes(blueprint.model, blueprint.family, warm_up_positions)
    return MemoryEstimate(steady + max(most, warm_up), steady, warm_up)


def _passing(tensor: StoredTensor) -> int:
    """Return the bytes of a tensor on its way to being packed."""
    cast = tensor.final_nbytes if tensor.final_dtype is not tensor.dtype else 0
    return tensor.nbytes + cast
