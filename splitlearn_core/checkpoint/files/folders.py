"""A folder of checkpoints: their names, which is the newest, and what killed processes left there.

    runs/a/
        000007-step-600/        a checkpoint: complete, synced, never written again
        000008-step-700/        the newest: the number before the step counts the saves
        .saving-…/              being written, and locked by who writes it
        .deleting-…/            on its way out
        .lock                   held by who changes the names above

There is no file that points to the newest, so none can point to nothing.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from splitlearn_core.checkpoint.files.disk import Disk
from splitlearn_core.checkpoint.files.manifest import MANIFEST_FILE
from splitlearn_core.errors import NoCheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so what may be somebody's is left
    fcntl = None

_NAME = re.compile(r"(\d{6,})-step-(\d+)")
_SAVING = ".saving-"
_DELETING = ".deleting-"
_LOCK = ".lock"


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A complete checkpoint, by its folder's name.

    Attributes:
        number: Counts the saves into this folder; the newest has the highest.
        step: Of training.
        path: Its folder.
    """

    number: int
    step: int
    path: Path

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """Return what a folder's name says; of one that was renamed, number 0 and step -1."""
        match = _NAME.fullmatch(path.name)
        return cls(int(match[1]), int(match[2]), path) if match else cls(0, -1, path)


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints that lie in a folder, the oldest first; none where it is not there."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names are all that is needed
    except FileNotFoundError:
        return []
    return sorted(Checkpoint.at(folder / name) for name in names if _NAME.fullmatch(name))


def find(path: Path) -> list[Checkpoint]:
    """Return the checkpoints that a path may mean, the oldest first: itself, or those in it.

    Raises:
        NoCheckpointError: (a `FileNotFoundError`) There is none.
    """
    if _NAME.fullmatch(path.name) or (path / MANIFEST_FILE).exists():
        if not path.is_dir():
            near = ", ".join(c.path.name for c in checkpoints_in(path.parent)) or "none"
            raise NoCheckpointError(f"no checkpoint {path}; beside it there are: {near}")
        return [Checkpoint.at(path)]
    if found := checkpoints_in(path):
        return found
    if not path.is_dir():
        raise NoCheckpointError(f"no checkpoint in {path}: there is no such folder")
    raise NoCheckpointError(
        f"no checkpoint in {path}: no folder there is called NUMBER-step-STEP (a save that did not"
        " end leaves none)"
    )


def with_older(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return the checkpoints beside one that were saved before it, the oldest first, and itself."""
    return [c for c in checkpoints_in(checkpoint.path.parent) if c < checkpoint] + [checkpoint]


# --- Changing what lies there ------------------------------------------------------------------


class Unfinished:
    """A checkpoint that is being written, in a hidden folder that this process has locked."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        """Make the folder; the caller has `folder` locked."""
        self._disk = disk
        self._folder = folder
        self.path = folder / f"{_SAVING}{os.getpid()}-{secrets.token_hex(4)}"
        disk.make_folder(self.path)
        self._lock = _lock(self.path / _LOCK, "new")

    def publish(self, step: int) -> Checkpoint:
        """Give it its name; from here on readers see it.

        Raises:
            OSError: It can't be; it has no name then.
        """
        with locked(self._folder):
            (self.path / _LOCK).unlink(missing_ok=True)
            self._disk.sync_folder(self.path)
            number = max((c.number for c in checkpoints_in(self._folder)), default=0) + 1
            target = self._folder / f"{number:06}-step-{step}"
            self._disk.rename(self.path, target)
        self._release()
        return Checkpoint.at(target)

    def discard(self) -> None:
        """Delete it; what can't be deleted is left for the next save."""
        self._release()
        with suppress(OSError):
            self._disk.remove_folder(self.path)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def begin(disk: Disk, folder: Path) -> Unfinished:
    """Make a hidden folder for a new checkpoint, and delete what killed processes left.

    Raises:
        OSError: It can't be made.
    """
    _make_folders(disk, folder)
    with locked(folder):
        _clean(disk, folder)
        return Unfinished(disk, folder)


def keep_newest(disk: Disk, folder: Path, count: int) -> None:
    """Delete all checkpoints but the newest `count`; those that somebody reads are left for now.

    Raises:
        OSError: One can't be deleted.
    """
    with locked(folder):
        for checkpoint in checkpoints_in(folder)[:-count]:
            if _is_free(checkpoint.path / MANIFEST_FILE):
                name = f"{_DELETING}{checkpoint.path.name}-{secrets.token_hex(4)}"
                disk.rename(checkpoint.path, folder / name)
        _delete_doomed(disk, folder)
    disk.sync_folder(folder)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted by `keep_last` while it is read."""
    lock = None
    with suppress(OSError):  # what is wrong with the manifest is told when it is read
        lock = _lock(path / MANIFEST_FILE, "shared")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the names in a folder meanwhile."""
    if fcntl is None:
        yield
        return
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _clean(disk: Disk, folder: Path) -> None:
    """Delete what was being written by processes that have ended."""
    _delete_doomed(disk, folder)
    if fcntl is None:
        return
    for path in folder.glob(f"{_SAVING}*"):
        if _is_free(path / _LOCK):
            disk.remove_folder(path)


def _delete_doomed(disk: Disk, folder: Path) -> None:
    for path in folder.glob(f"{_DELETING}*"):
        disk.remove_folder(path)


def _is_free(path: Path) -> bool:
    """Whether nobody has a file locked; one that is not there is nobody's."""
    try:
        lock = _lock(path, "exclusive")
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    if lock is not None:
        os.close(lock)
    return True


def _lock(path: Path, how: Literal["new", "exclusive", "shared"]) -> int | None:
    """Lock a file; `None` where the system can't.

    Raises:
        BlockingIOError: Somebody else has it.
        FileNotFoundError: It is not there, and not to be made.
    """
    if fcntl is None:
        return None
    flags = {"new": os.O_RDWR | os.O_CREAT, "exclusive": os.O_RDWR, "shared": os.O_RDONLY}[how]
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if how == "shared" else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return file


def _make_folders(disk: Disk, folder: Path) -> None:
    """Make a folder and those that it lies in, durably."""
    if folder.is_dir():
        return
    _make_folders(disk, folder.parent)
    with suppress(FileExistsError):  # made by another process just now
        disk.make_folder(folder)
    disk.sync_folder(folder.parent)
