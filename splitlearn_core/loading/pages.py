"""Giving back the pages of a mapped file one tensor at a time, as soon as each has been copied.

All of them go when the mapping ends, in one call that is made with the interpreter's lock held:
after gigabytes, no thread of the process runs for tenths of a second.  Given back by the thread
that has just copied a tensor they cost as much, and hold nobody up.
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

from splitlearn_core.mappings import libc, mappings

if TYPE_CHECKING:
    import torch


class MappedPages:
    """The pages of the files that one source has mapped; does nothing but on Linux.

    Only pages of files are given back: whoever looks at them again reads them from the file.  Of
    memory of any other kind what is in it would be lost, so it is left alone.
    """

    def __init__(self) -> None:
        self._spans: list[range] = []

    def give_back(self, tensor: torch.Tensor) -> None:
        """Give back the pages that a tensor has to itself; from any thread.

        Args:
            tensor: Contiguous, and never written to: changes of a private mapping would be lost.
        """
        pages = _whole_pages(tensor.data_ptr(), tensor.nbytes)
        if sys.platform == "linux" and pages and self._has(pages):
            libc().madvise(pages.start, len(pages), mmap.MADV_DONTNEED)

    def _has(self, pages: range) -> bool:
        """Whether pages are of a mapped file."""
        if not any(_is_within(pages, span) for span in self._spans):
            self._spans = [found.addresses for found in mappings() if found.is_of_file]
        return any(_is_within(pages, span) for span in self._spans)


def _whole_pages(address: int, nbytes: int) -> range:
    """Return the addresses of the pages that lie within a block as a whole."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    return range(start, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE)


def _is_within(pages: range, span: range) -> bool:
    return span.start <= pages.start and pages.stop <= span.stop
