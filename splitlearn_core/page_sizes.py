"""How much memory bytes take that fill it from the beginning.

Memory comes in pages of 4 KiB, of which the last may be half empty.  Pages of 2 MiB are read much
faster, by a processor that runs a virtual machine above all (`splitlearn_core.huge_pages`), but
each is taken whole.  What grows is therefore in small pages until it fills half of a huge one.
"""

from __future__ import annotations

import mmap

PAGE = mmap.PAGESIZE
"""Bytes of an ordinary page."""

HUGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with pages of 4 KiB."""


def huge_pages_of(nbytes: int) -> int:
    """Return how many huge pages so many bytes fill, at least by half."""
    return (nbytes + HUGE // 2) // HUGE


def memory_of(nbytes: int) -> int:
    """Return the bytes of memory that so many take."""
    return max(huge_pages_of(nbytes) * HUGE, -(-nbytes // PAGE) * PAGE)
