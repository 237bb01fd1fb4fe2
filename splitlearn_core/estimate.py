"""How much memory a part will take: pure values; `factory.estimate_component` has the figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_core.loading.ahead import AT_ONCE

if TYPE_CHECKING:
    from splitlearn_core.loading.materialize import Placement
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
