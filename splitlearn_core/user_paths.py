"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with `~` or `~name` at its beginning replaced by the home.

    Where there is no such user it stays as it is, so that what comes next says what is not there
    (`Path.expanduser` raises a RuntimeError).
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111 - see above
