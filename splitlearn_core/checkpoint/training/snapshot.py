"""A copy of tensors in memory of its own, made quickly, so that training can go on meanwhile.

The memory is one block that is used again by the next snapshot: to find new memory takes the system
as long as to copy.  On Linux it is asked for in large pages, which are found faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor

import torch

from splitlearn_core.huge_pages import huge_empty

# What one thread copies at a time.
_PIECE_BYTES = 16 * 1024 * 1024
# Each tensor begins at a multiple of a cache line.
_ALIGNMENT = 64

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""By file and name."""


class Snapshot:
    """Room for copies of tensors, as much as the largest state so far has needed."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on to."""
        return self._room.numel()

    def take(self, tensors: Tensors, copying: Executor) -> dict[str, dict[str, torch.Tensor]]:
        """Copy tensors, over those that were taken before.

        Args:
            tensors: On any device, of any layout in memory.
            copying: Threads that copy.

        Returns:
            The same in this memory, on the CPU, contiguous.
        """
        each = [tensor for file in tensors.values() for tensor in file.values()]
        self._make_room(sum(_padded(tensor.nbytes) for tensor in each))
        places = self._places(each)
        made = {f: {n: next(places) for n in names} for f, names in tensors.items()}
        pairs = zip(each, (t for file in made.values() for t in file.values()), strict=True)
        jobs = [
            copying.submit(_copy, target, source)
            for tensor, place in pairs
            for target, source in _pieces(place, tensor)
        ]
        for job in jobs:
            job.result()
        return made

    def release(self) -> None:
        """Give the memory back, once the last copies are no longer used."""
        self._room = torch.empty(0, dtype=torch.uint8)

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self._room.numel():
            self.release()  # before the new is there, not after
            self._room = huge_empty(nbytes)

    def _places(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the place of each tensor."""
        position = 0
        for tensor in tensors:
            flat = self._room[position : position + tensor.nbytes]
            yield flat.view(tensor.dtype).view(tensor.shape)
            position += _padded(tensor.nbytes)


def _pieces(
    target: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a copy into such as several threads can do at once."""
    if not source.is_contiguous():
        yield target, source
        return
    step = _PIECE_BYTES // source.itemsize
    target, source = target.view(-1), source.detach().view(-1)
    for start in range(0, source.numel(), step):
        yield target[start : start + step], source[start : start + step]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def threads() -> int:
    """Return how many threads copy at once: training waits meanwhile, so all there are."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
