"""Giving back the pages of a mapped file one tensor at a time, as soon as each has been copied.

All of them go when the mapping ends, in one call that is made with the interpreter's lock held:
after gigabytes, no thread of the process runs for tenths of a second.  Given back by the thread
that has just copied a tensor they cost as much, and hold nobody up.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MAPS = Path("/proc/self/maps")


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
            _madvise()(pages.start, len(pages), mmap.MADV_DONTNEED)

    def _has(self, pages: range) -> bool:
        """Whether pages are of a mapped file."""
        if not any(_is_within(pages, span) for span in self._spans):
            self._spans = list(_file_mappings())
        return any(_is_within(pages, span) for span in self._spans)


def _whole_pages(address: int, nbytes: int) -> range:
    """Return the addresses of the pages that lie within a block as a whole."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    return range(start, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE)


def _is_within(pages: range, span: range) -> bool:
    return span.start <= pages.start and pages.stop <= span.stop


def _file_mappings() -> Iterator[range]:
    """Yield the addresses at which files are mapped, see proc_pid_maps(5)."""
    try:
        lines = _MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, _, end = addresses.partition("-")
            yield range(int(start, 16), int(end, 16))


@cache
def _madvise() -> Any:
    """Return madvise(2); what is called by way of ctypes runs without the interpreter's lock."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
