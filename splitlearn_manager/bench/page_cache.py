"""The state of the page cache, made and checked: a file in memory (warm), or on the disk (cold)."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

from splitlearn_manager.bench.errors import BenchError

Span = tuple[int, int]

_CHUNK_BYTES = 1024 * 1024
# A page or two may come back at once, with the file's length or a neighbour's read-ahead.
_MOST_LEFT = 0.01


def warm(paths: Iterable[Path]) -> None:
    """Read files through, so that they are in the page cache, as far as there is room."""
    for path in paths:
        read_spans(path, [(0, path.stat().st_size)])


def drop(paths: Iterable[Path]) -> None:
    """Put files out of the page cache.

    Raises:
        BenchError: The system keeps them: some process has them mapped, or the file system can't.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (share := cached_share(path)) > _MOST_LEFT:
            raise BenchError(
                f"{path} can't be put out of the page cache ({share:.0%} of it stayed): use a"
                " --work-dir on a disk, and end what uses the file"
            )


def cached_share(path: Path) -> float:
    """Return how much of a file is in the page cache, from 0 to 1; mincore(2) tells."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    # a private mapping, writable because ctypes gives addresses of nothing else; none is written
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        failed = libc.mincore(address, ctypes.c_size_t(size), present)
        del anchor  # the mapping can't be closed while it is held
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(bytes(present)) / pages


def read_spans(path: Path, spans: Iterable[Span]) -> float:
    """Read parts of a file in order, plainly; return the seconds that it took."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        for begin, end in spans:
            file.seek(begin)
            left = end - begin
            while left > 0 and (count := file.readinto(buffer[: min(left, _CHUNK_BYTES)])):
                left -= count
    return time.perf_counter() - start
