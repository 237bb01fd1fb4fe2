"""How much memory a part will take: pure values; `factory.estimate_component` has the figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_core.loading.ahead import AT_ONCE

if TYPE_CHECKING:
    from splitlearn_core.loading.materialize import PartReads, Placement
    from splitlearn_core.loading.packing import PackingPlan
    from splitlearn_core.loading.sources import StoredTensor


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a load needs.

    Mapped weights count fully, whether their pages are touched or not.

    Attributes:
        peak_bytes: At the worst moment of the load.
        steady_bytes: Once it is done.
    """

    peak_bytes: int
    steady_bytes: int

    def __add__(self, other: MemoryEstimate) -> MemoryEstimate:
        """Return the estimate of both, loaded one after the other."""
        steady = self.steady_bytes + other.steady_bytes
        peak = max(self.peak_bytes, self.steady_bytes + other.peak_bytes)
        return MemoryEstimate(peak, steady)


def estimate_tensors(stored: Iterable[StoredTensor], placement: Placement) -> MemoryEstimate:
    """Add up what stored tensors will take, once they are placed.

    Args:
        stored: Each of them once, however many of the model's tensors it gives values to.
        placement: Device, dtype, and whether they may stay mapped.
    """
    steady = 0
    largest_passing = 0
    for tensor in stored:
        final = placement.final_dtype(tensor)
        steady += tensor.nbytes // tensor.dtype.itemsize * final.itemsize
        if tensor.nbytes > largest_passing and placement.copies(tensor):
            largest_passing = tensor.nbytes
    return MemoryEstimate(steady + AT_ONCE * largest_passing, steady)


def estimate_part(
    reads: PartReads, placement: Placement, packing: PackingPlan | None = None
) -> MemoryEstimate:
    """Add up what a part will take, its packed layers included.

    What is packed passes through twice: as it is stored, and, where that is another dtype, as it
    is computed with.

    Args:
        reads: What the part needs.
        placement: Device, dtype, and whether tensors may stay mapped.
        packing: Which layers are packed.
    """
    if packing is None:
        return estimate_tensors(reads.stored.values(), placement)
    stored = reads.stored
    kept = estimate_tensors(
        (tensor for name, tensor in stored.items() if name not in packing.stored), placement
    )
    steady = kept.steady_bytes + sum(layer.nbytes for layer in packing.layers.values())
    largest = max((_passing(stored[name], placement) for name in packing.stored), default=0)
    scratch = max((layer.scratch for layer in packing.layers.values()), default=0)
    passing = max(kept.peak_bytes - kept.steady_bytes, AT_ONCE * largest)
    return MemoryEstimate(steady + passing + scratch, steady)


def _passing(tensor: StoredTensor, placement: Placement) -> int:
    """Return the bytes of a tensor on its way to being packed."""
    final = placement.final_dtype(tensor)
    if final is tensor.dtype:
        return tensor.nbytes
    return tensor.nbytes + tensor.nbytes // tensor.dtype.itemsize * final.itemsize
