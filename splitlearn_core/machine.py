"""How much memory there is: of the machine, of the container, of an accelerator."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator


class Memory(NamedTuple):
    """Bytes of one kind of memory: all of it, and what can still be had now."""

    total: int
    available: int


def host_memory() -> Memory:
    """Return the main memory that this process can have: the machine's, or its container's."""
    machine = psutil.virtual_memory()
    limits = [Memory(machine.total, machine.available), *container_memory()]
    return Memory(min(m.total for m in limits), min(m.available for m in limits))


def cuda_memory(index: int) -> Memory:
    """Return the memory of a CUDA device; the first call starts CUDA, which takes seconds."""
    import torch  # noqa: PLC0415 - only those who have an accelerator pay for it here

    available, total = torch.cuda.mem_get_info(index)
    return Memory(total, available)


def return_freed_memory() -> bool:
    """Give what was freed back to the operating system; glibc keeps much of it for later.

    Takes milliseconds, with the allocator's locks held.  What glibc maps for itself (above 128 KiB
    at first, up to 32 MiB as a program goes on, mallopt(3)) goes back when it is freed; smaller
    blocks stay unless this is called (malloc_trim(3)).

    Returns:
        Whether there was something to call: other C libraries have no such thing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None:
        return False
    trim(0)
    return True


# mallopt(3); a threshold that is set stays, else glibc raises both with each large block freed
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BLOCK = 1 << 20
_LARGEST_KEPT = 32 << 20
"""The most that glibc takes for this."""
_TRIM_THRESHOLD = 64 << 20
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def map_large_blocks() -> bool:
    """Let glibc map each block of 1 MiB or more for itself, in the whole process.

    Such a block goes back to the system when it is freed, and the next one is found page by page.
    For work in which what is held at any time matters more than time.

    Returns:
        Whether that was done: not where there is no glibc, or its settings come from the
        environment.
    """
    return _set_malloc({_M_MMAP_THRESHOLD: _LARGE_BLOCK, _M_TRIM_THRESHOLD: _TRIM_THRESHOLD})


def keep_freed_blocks() -> bool:
    """Let glibc keep what a forward has freed for the next one, in the whole process.

    What a forward takes and frees again, in blocks of some MB, is then found without the system,
    which takes longer to find and clear a page than a layer does to fill it.  All threads share one
    arena, as far as none has another by now: what is left free in it goes back as a whole with
    `return_freed_memory`, while in a thread's own the last block in use keeps all before it.
    Blocks above 32 MiB, such as large weights, still go back at once.

    Returns:
        As `map_large_blocks`.
    """
    return _set_malloc(
        {
            _M_ARENA_MAX: 1,
            _M_MMAP_THRESHOLD: _LARGEST_KEPT,
            _M_TRIM_THRESHOLD: _TRIM_THRESHOLD,
        }
    )


def _set_malloc(settings: dict[int, int]) -> bool:
    """Set parameters of glibc's malloc, unless the environment has set some."""
    if any(name in os.environ for name in _SETTINGS):
        return False
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return all(mallopt(name, value) for name, value in settings.items())


@dataclass(frozen=True)
class _Layout:
    """Where one version of cgroups keeps its figures."""

    mount: str
    limit: str
    used: str
    cache: tuple[str, ...]


# https://docs.kernel.org/admin-guide/cgroup-v2.html and …/cgroup-v1/memory.html
_V2 = _Layout("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Layout(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def container_memory(root: Path = Path("/")) -> Iterator[Memory]:
    """Yield the limits that hold for this process: its control group's, and its ancestors'.

    Pages of files count as used by a group, but are given up when it needs the room, so they are
    available.  What can't be read (a path of the host's that a container does not see) is no limit.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(root, _V2, path)
        elif "memory" in controllers.split(","):
            yield from _limits(root, _V1, path)


def _limits(root: Path, layout: _Layout, path: str) -> Iterator[Memory]:
    """Yield the limits from a group up to the root of its hierarchy."""
    mount = root / layout.mount
    group = mount / path.strip("/")
    while True:
        limit = _number(group / layout.limit)
        if limit is not None:
            used = _number(group / layout.used) or 0
            yield Memory(limit, max(0, limit - used + _cached(group, layout)))
        if group == mount:
            return
        group = group.parent


def _cached(group: Path, layout: _Layout) -> int:
    """Return the bytes of files' pages that a group holds."""
    figures = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
    return sum(int(figures.get(name, 0)) for name in layout.cache)


def _number(file: Path) -> int | None:
    """Return the number in a file; `max` means that there is none."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(file: Path) -> list[str]:
    """Return a file's lines, none where it can't be read."""
    try:
        return file.read_text("ascii").splitlines()
    except OSError:
        return []
