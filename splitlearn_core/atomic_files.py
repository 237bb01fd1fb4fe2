"""Files that are there whole or not at all, whatever happens while they are written.

A new file is written beside its place, brought to the disk, and renamed; then the folder is brought
to the disk, too.  Who reads meanwhile, and who looks after a crash, sees the old file or the new
one.  A process that is killed leaves a hidden file behind, and nothing else.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend the path of a hidden file beside `path`, which takes its place if nothing is raised.

    The caller writes the file and closes it.  Also needed where the old file is mapped: to
    overwrite it would change whatever is mapped from it.

    Raises:
        OSError: The file can't be brought to the disk or renamed; nothing new is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk.

    Raises:
        OSError: The disk is full or failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
