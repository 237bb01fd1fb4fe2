"""What this process has mapped, and what Linux is told of it: proc_pid_maps(5), madvise(2)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAPS = Path("/proc/self/maps")


class Mapping(NamedTuple):
    """Addresses that mean one thing.

    Attributes:
        addresses: Those of its bytes.
        permissions: As the system writes them: `rw-p` is private memory.
        is_of_file: Whether a file is behind it.
        name: Of the file, or of what it is for; may be empty.
    """

    addresses: range
    permissions: str
    is_of_file: bool
    name: str


def mappings() -> Iterator[Mapping]:
    """Yield all mappings, in the order of their addresses; none where the system does not tell."""
    try:
        lines = _MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield Mapping(range(start, end), permissions, inode != "0", "".join(name))


@cache
def libc() -> Any:
    """Return the C library; what is called by way of ctypes runs without the interpreter's lock."""
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return library
