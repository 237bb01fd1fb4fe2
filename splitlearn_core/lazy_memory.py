"""Memory that is taken as it is written to, page by page, and is back when it is given up.

A tensor from torch's allocator is whole from the beginning, and what is freed may stay with the
process, in holes that nothing else fits.  A mapping of its own takes address space, and of memory
only the pages that were written to; the system has all of it back when the last tensor on it goes.
"""

from __future__ import annotations

import math
import mmap
from threading import Lock
from typing import Any, Self

import torch

__all__ = ["PAGE", "lazy_empty"]

PAGE = mmap.PAGESIZE
"""Bytes."""

_MOST = 40_000
"""Mappings at once: a process of Linux may have 65,530 of all kinds, unless neighbours merge."""

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


_CAN = all(hasattr(mmap, name) for name in ("MAP_ANONYMOUS", "MADV_NOHUGEPAGE"))  # Linux


def lazy_empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor of zeros, whose pages are taken as they are written to.

    Args:
        shape: Its sizes, with room to grow into.
        like: Has the dtype and the device.

    Returns:
        `None` where there is no such memory: on another device or system, or when the process has
        as many mappings as it should.
    """
    nbytes = math.prod(shape) * like.element_size()
    if not _CAN or like.device.type != "cpu" or not nbytes or _Mapping.live >= _MOST:
        return None
    try:
        mapping: Any = _Mapping(nbytes)
    except OSError:
        return None
    return torch.frombuffer(mapping, dtype=like.dtype).view(shape)
