"""Reading files that nobody vouches for: regular ones only, and no more of them than is sound.

To open a pipe waits for whoever writes into it, and a device may give bytes without end: neither
is ever read, whatever its name.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any

from splitlearn_core.errors import CheckpointError
from splitlearn_core.messages import short

# How the text begins that git keeps in the place of a large file.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# The index of the largest published checkpoints (100,000 tensors) has about 12 MB.
MAX_JSON_BYTES = 32 * 1024 * 1024


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: As `open` does.
        CheckpointError: (a `ValueError`) It is a folder, a pipe, a device or a socket; or a pointer
            that git-lfs has not replaced yet.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - handed out
    except OSError:
        refuse_unless_regular(path)
        raise
    try:
        _check_opened(file, path)
    except BaseException:
        file.close()
        raise
    return file


def _check_opened(file: BufferedReader, path: Path) -> None:
    """Refuse what is no regular file, or only stands for one."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise _not_regular(path)
    if file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
        )


def refuse_unless_regular(path: Path) -> None:
    """Refuse what is there, and is no regular file.

    Raises:
        CheckpointError: (a `ValueError`) It is a folder, a pipe, a device or a socket.
    """
    if path.exists() and not path.is_file():
        raise _not_regular(path)


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        unique_keys: Refuse objects that name a key twice; JSON would keep the last.

    Raises:
        OSError: As `open` does.
        CheckpointError: (a `ValueError`) It is no JSON, too large, or no regular file.
    """
    with open_regular(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is too large: the limit is {MAX_JSON_BYTES} bytes")
    return parse_json(content, str(path), unique_keys=unique_keys)


def parse_json(content: bytes, where: str, *, unique_keys: bool = False) -> Any:
    """Parse JSON of unknown origin; `where` names it in errors."""
    hook = _unique if unique_keys else None
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not readable JSON: {error}") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _not_regular(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not a regular file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object's dict, and refuse a key that is there twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{short(counts.most_common(1)[0][0])} is there twice")
    return result
