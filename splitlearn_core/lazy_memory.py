"""Memory that is taken as it is filled, from its beginning, and is back when it is given up.

A tensor from torch's allocator is whole from the beginning, and what is freed may stay with the
process, in holes that nothing else fits.  A mapping of its own takes address space, and of memory
only the pages that were filled; the system has all of it back when the last tensor on it goes.

Pages are huge ones as far as they are filled (`splitlearn_core.page_sizes`).
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch

from splitlearn_core.huge_pages import COLLAPSE
from splitlearn_core.page_sizes import HUGE, huge_pages_of, memory_of

__all__ = ["LazyMemory", "lazy_memory"]

_MOST = 25_000
"""Mappings at once: a process of Linux may have 65,530 of all kinds, and each of these becomes two
with its first huge page."""

_NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux, which Python has no name for: address space is not counted as memory."""


class _Mapping(mmap.mmap):
    """An anonymous mapping, counted."""

    live = 0
    lock = Lock()

    def __new__(cls, nbytes: int) -> Self:
        """Map so many bytes.

        Raises:
            OSError: The system has no room, or too many mappings.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self = super().__new__(cls, -1, nbytes, flags=flags)
        with cls.lock:
            cls.live += 1
        self.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be taken whole
        return self

    def __del__(self) -> None:
        """Count it no longer; the memory goes with the object."""
        with self.lock:
            type(self).live -= 1


_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_NEVER = "2"
"""What stands there where all address space counts as memory: see proc(5)."""


def _can() -> bool:
    """Whether this is Linux, and address space costs nothing."""
    if not all(hasattr(mmap, name) for name in ("MAP_ANONYMOUS", "MADV_NOHUGEPAGE")):
        return False
    try:
        return _OVERCOMMIT.read_text(encoding="ascii").strip() != _NEVER
    except OSError:
        return True


_CAN = _can()


class LazyMemory:
    """Zeros, whose pages are taken as they are written to.

    Args:
        nbytes: How many there is address space for.

    Attributes:
        bytes: uint8 [nbytes] on the CPU.  Tensors that are views of it keep the memory.

    Raises:
        OSError: The system has no room, or too many mappings.
    """

    def __init__(self, nbytes: int) -> None:
        self._mapping: Any = _Mapping(nbytes + 2 * HUGE)
        whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._offset = -whole.data_ptr() % HUGE
        self.bytes = whole[self._offset : self._offset + nbytes]
        self._filled = 0
        self._huge = 0

    def fill(self, end: int) -> None:
        """Prepare to be written to up to byte `end`; bytes before that may be written by now."""
        if end <= self._filled:
            return
        pages = huge_pages_of(end)
        if pages > self._huge:
            self._enlarge(pages)
        self._filled = end

    @property
    def taken(self) -> int:
        """Bytes of memory that were taken, if all was written that was prepared to be."""
        return memory_of(self._filled)

    def _enlarge(self, pages: int) -> None:
        """Have the first so many pages be huge ones.

        One that is in small pages by now is moved; the rest come to be where they are written to.
        A system without huge pages leaves all as it is.
        """
        start = self._huge * HUGE
        with suppress(OSError):
            advised = (self._offset + start, pages * HUGE - start)
            self._mapping.madvise(mmap.MADV_HUGEPAGE, *advised)
            if self._filled > start:
                self._mapping.madvise(COLLAPSE, advised[0], HUGE)
        self._huge = pages


def lazy_memory(nbytes: int, device: torch.device) -> LazyMemory | None:
    """Return memory with address space for so many bytes.

    Returns:
        `None` where there is no such memory: on another device or system, or when the process has
        as many mappings as it should.
    """
    if not _CAN or device.type != "cpu" or not nbytes or _Mapping.live >= _MOST:
        return None
    try:
        return LazyMemory(nbytes)
    except OSError:
        return None
