"""Disks that fail, or whose process is killed, at a chosen call."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from splitlearn_core.checkpoint.files.disk import Disk


class CountingDisk(Disk):
    """Counts the calls that change something; a subclass acts at one of them."""

    def __init__(self, fatal: int = -1) -> None:
        self.calls: list[str] = []
        self._fatal = fatal

    def act(self) -> None:
        """Do what this disk does at the fatal call."""

    def _call(self, name: str) -> bool:
        """Count a call; return whether it is the fatal one."""
        self.calls.append(name)
        return len(self.calls) - 1 == self._fatal

    def make_folder(self, path: Path) -> None:
        """See `Disk`."""
        if self._call("make_folder"):
            self.act()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        """See `Disk`."""
        if self._call("create"):
            self.act()
        return super().create(path)

    def write(self, file: int, data: memoryview) -> int:
        """See `Disk`; where it is the fatal call, half is written before."""
        if self._call("write"):
            super().write(file, data[: len(data) // 2])
            self.act()
        return super().write(file, data)

    def sync_file(self, file: int) -> None:
        """See `Disk`."""
        if self._call("sync_file"):
            self.act()
        super().sync_file(file)

    def sync_folder(self, path: Path) -> None:
        """See `Disk`."""
        if self._call("sync_folder"):
            self.act()
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        """See `Disk`."""
        if self._call("rename"):
            self.act()
        super().rename(source, target)

    def remove_folder(self, path: Path) -> None:
        """See `Disk`; where it is the fatal call, one file is removed before."""
        if path.exists() and self._call("remove_folder"):
            next(p for p in sorted(path.iterdir()) if p.is_file()).unlink()
            self.act()
        super().remove_folder(path)


class FullDisk(CountingDisk):
    """A disk that is full, for good, from a call on."""

    def __init__(self, fatal: int = -1) -> None:
        super().__init__(fatal)
        self._is_full = False

    def act(self) -> None:
        """Fail."""
        self._is_full = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _call(self, name: str) -> bool:
        return super()._call(name) or (self._is_full and name in {"write", "create", "sync_file"})


class DeadlyDisk(CountingDisk):
    """A disk at one of whose calls the process is killed."""

    def act(self) -> None:
        """Die as by `kill -9`."""
        os.kill(os.getpid(), signal.SIGKILL)
