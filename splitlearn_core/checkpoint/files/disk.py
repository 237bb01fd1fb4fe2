"""All that saving a checkpoint asks of the file system, in one place.

Tests put a disk in its stead that is full, or whose process is killed, at any of these calls.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from splitlearn_core.atomic_files import sync


class Disk:
    """The file system."""

    def make_folder(self, path: Path) -> None:
        """Make a folder that is not there."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Make a file that is not there, and open it for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0))

    def write(self, file: int, data: memoryview) -> int:
        """Write some of `data`; return how many bytes."""
        return os.write(file, data)

    def sync_file(self, file: int) -> None:
        """Bring what was written to the disk."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """Close a file."""
        os.close(file)

    def sync_folder(self, path: Path) -> None:
        """Bring a folder's names to the disk, where the system can (Windows can't)."""
        if hasattr(os, "O_DIRECTORY"):
            sync(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder another name, which no other has."""
        source.rename(target)

    def remove_folder(self, path: Path) -> None:
        """Delete a folder and all in it; one that is gone is no error."""
        if path.exists():
            shutil.rmtree(path)


def begin_writeback(file: int, start: int, length: int) -> None:
    """Let the system begin to bring bytes to the disk, and don't wait for it.

    Otherwise nothing would be brought there before the file is synced, and the disk be idle until
    then.  Linux begins when it is told that they are not needed (posix_fadvise(2)); elsewhere this
    does nothing.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)
