"""How much memory a part will take: pure values; `factory.estimate_component` has the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_core.loading.ahead import AT_ONCE

if TYPE_CHECKING:
    from splitlearn_core.builder import Blueprint
    from splitlearn_core.loading.materialize import Placement


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


def estimate_part(blueprint: Blueprint, placement: Placement) -> MemoryEstimate:
    """Add up what a part will take: stored tensors once they are placed, and computed ones.

    A stored tensor counts once, however many of the model's tensors it gives values to.  Tables are
    computed when the stored ones have passed.

    Args:
        blueprint: The part.
        placement: Device, and whether weights may stay mapped.
    """
    stored = blueprint.reads.stored.values()
    steady = sum(tensor.final_nbytes for tensor in stored) + blueprint.tables_nbytes
    largest = max((t.nbytes for t in stored if placement.copies(t)), default=0)
    return MemoryEstimate(steady + max(AT_ONCE * largest, blueprint.making_nbytes), steady)
