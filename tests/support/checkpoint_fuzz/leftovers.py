"""What a case leaves behind, in the process and on disk, and the memory that it took (Linux)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMORY_GROWTH = 64 * 2**20
_SELF = Path("/proc/self")


class Guard:
    """Looks at a process before a case and after it."""

    def __init__(self, scratch: Path) -> None:
        gc.collect()
        self._scratch = scratch
        self._before = self._look()
        self._resident = status("VmRSS")
        (_SELF / "clear_refs").write_text("5")  # the peak begins anew

    def complaints(self) -> Iterator[str]:
        """Say what is there that was not, and what was taken in between."""
        growth = status("VmHWM") - self._resident
        if growth > MEMORY_GROWTH:
            yield f"took {growth >> 20} MB"
        gc.collect()
        for what, now in self._look().items():
            if more := now - self._before[what]:
                yield f"left {what}: {sorted(more)[:5]}"

    def _look(self) -> dict[str, set[str]]:
        return {
            "files": {str(p) for p in self._scratch.rglob("*")},
            "threads": {entry.name for entry in (_SELF / "task").iterdir()},
            "descriptors": set(_descriptors()),
            "mappings": set(_mappings(self._scratch)),
        }


def status(key: str) -> int:
    """Return a figure of this process, in bytes: `VmRSS`, `VmHWM`, `VmSize`."""
    lines = (_SELF / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _descriptors() -> Iterator[str]:
    for entry in (_SELF / "fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            yield f"{entry.name} {entry.readlink()}"


def _mappings(folder: Path) -> Iterator[str]:
    for line in (_SELF / "maps").read_text().splitlines():
        if str(folder) in line:
            yield line.split(maxsplit=5)[5]
