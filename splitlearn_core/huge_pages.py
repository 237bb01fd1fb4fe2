"""Memory for weights in the largest pages that the system has.

A forward reads every weight once.  With pages of 4 KiB the processor has to look up where 512 of
them lie for what is one page of 2 MiB, and where it runs in a virtual machine each look-up is
several.  Nothing changes but the time.

Transparent huge pages are asked for with madvise(2), as `transparent_hugepage/enabled` allows by
default.  Where there are none, memory is what it would have been.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

import torch

from splitlearn_core.mappings import libc, mappings
from splitlearn_core.page_sizes import HUGE

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 32 << 20
_ALIGNMENT = 64
_ENOUGH = 0.75
COLLAPSE = 25
"""MADVCOLLAPSE of Linux 6.1, which Python has no name for."""

_OF_LIBRARIES = ("", "[heap]")
"""How mappings are named that the C library and others give memory from."""

_CAN = all(hasattr(mmap, name) for name in ("MAP_ANONYMOUS", "MADV_HUGEPAGE"))


class HugeArena:
    """Gives memory for the tensors of one part, one after the other, out of huge pages.

    Tensors lie side by side in mappings of some 32 MiB, so that no more than one page is left
    unused in each; a mapping goes back to the system with the last tensor on it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor without a value, on the CPU; from any thread.

        Raises:
            MemoryError: The system has no room for it.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if not _CAN or not nbytes:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            chunk, offset = self._take(nbytes)
        count = nbytes // dtype.itemsize
        return torch.frombuffer(chunk, dtype=dtype, count=count, offset=offset).view(shape)

    def _take(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """Return a mapping, and where in it there is room."""
        if self._chunk is None or self._used + nbytes > len(self._chunk):
            self._chunk = _mapped(max(nbytes + HUGE, _CHUNK + HUGE))
            self._used = -_address(self._chunk) % HUGE
        offset = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._chunk, offset


def huge_empty(nbytes: int) -> torch.Tensor:
    """Return bytes without a value, which go back to the system when they are dropped.

    Raises:
        MemoryError: The system has no room for them.
    """
    if not _CAN or not nbytes:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(_mapped(nbytes), dtype=torch.uint8)


def collapse() -> int:
    """Move what this process has in small pages into huge ones, where these are nearly full.

    For memory that other libraries have taken: it stays at its addresses.  Holes of up to a quarter
    of a huge page are filled, which the C library uses for what comes next.  Memory that was set
    apart for small pages (MADV_NOHUGEPAGE) is left alone.  Takes as long as copying it.

    Returns:
        Bytes that are in huge pages now of those that were looked at; 0 where the system can't.
    """
    if not _CAN:
        return 0
    return sum(
        len(pages)
        for span in _anonymous()
        for pages in _resident(span)
        if not libc().madvise(pages.start, len(pages), COLLAPSE)
    )


def _mapped(nbytes: int) -> mmap.mmap:
    """Map anonymous memory, in huge pages where there are any."""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system has no {nbytes:,} bytes of memory: {error}") from error
    with suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _address(mapping: mmap.mmap) -> int:
    return torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()


def _anonymous() -> Iterator[range]:
    """Yield the whole huge pages of each private mapping that is of no file."""
    for found in mappings():
        if found.permissions != "rw-p" or found.is_of_file or found.name not in _OF_LIBRARIES:
            continue
        start = -(-found.addresses.start // HUGE) * HUGE
        end = found.addresses.stop // HUGE * HUGE
        if start < end:
            yield range(start, end)


def _resident(span: range) -> Iterator[range]:
    """Yield the stretches of huge pages that are in memory, but for small holes: mincore(2)."""
    small = HUGE // mmap.PAGESIZE
    states = (ctypes.c_ubyte * (len(span) // mmap.PAGESIZE))()
    if libc().mincore(span.start, len(span), states):
        return  # it has gone meanwhile
    present = bytes(states).translate(_LOWEST_BIT)
    start: int | None = None
    for number in range(len(span) // HUGE):
        if present.count(1, number * small, (number + 1) * small) >= small * _ENOUGH:
            start = number if start is None else start
        elif start is not None:
            yield range(span.start + start * HUGE, span.start + number * HUGE)
            start = None
    if start is not None:
        yield range(span.start + start * HUGE, span.stop)


_LOWEST_BIT = bytes(number & 1 for number in range(256))
"""mincore(2) defines no other."""
