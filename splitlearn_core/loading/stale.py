"""Clear the part cache of what downloads left that ended long ago and were never gone on with."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # no __all__ there

logger = logging.getLogger(__name__)

# A download that broke off may be gone on with for so long.
STALE_SECONDS = 7 * 24 * 3600

_OF_A_DOWNLOAD = (".partial", ".journal", ".lock")
_SMALL_FILE = ".tmp"
# Long enough for one attempt; who holds a lock is not waited for.
_LOCK_SECONDS = 0.01


def remove_stale(folder: Path) -> None:
    """Remove unfinished downloads, and the locks of finished ones, that nobody has touched lately.

    What cannot be removed stays: the cache is of use with it.

    Args:
        folder: The cache of parts, of all models.
    """
    limit = time.time() - STALE_SECONDS
    for key, paths in _groups(folder).items():
        with suppress(OSError, TimeoutError):
            if max(path.stat().st_mtime for path in paths) < limit:
                _remove(key, paths)


def _groups(folder: Path) -> dict[Path, list[Path]]:
    """Return the files of each download by the path that they begin with; others each alone."""
    groups: dict[Path, list[Path]] = {}
    for path in folder.rglob("*"):
        if path.suffix in _OF_A_DOWNLOAD:
            groups.setdefault(path.with_suffix(""), []).append(path)
        elif path.suffix == _SMALL_FILE:
            groups[path] = [path]
    return groups


def _remove(key: Path, paths: Iterable[Path]) -> None:
    """Remove files, those of a download under its lock, which goes last."""
    logger.info("%s: removing what is left of it, which is old", key)
    if key.suffix == _SMALL_FILE:
        key.unlink(missing_ok=True)
        return
    lock = key.with_suffix(".lock")
    with WeakFileLock(lock, timeout=_LOCK_SECONDS):
        for path in (*(path for path in paths if path != lock), lock):
            path.unlink(missing_ok=True)
