"""A file is the old one or the new one."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from splitlearn_core.atomic_files import replacing

if TYPE_CHECKING:
    from pathlib import Path


def test_the_new_file_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    with replacing(path) as new, path.open("rb") as open_before:
        new.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    with path.open("rb") as file:
        assert file.read() == b"new"

    assert list(tmp_path.iterdir()) == [path]
    assert open_before.closed


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    with pytest.raises(RuntimeError, match="half-way"):
        _write_half(path)

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_at_the_sync_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as new:
        new.write_bytes(b"new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _write_half(path: Path) -> None:
    with replacing(path) as new:
        new.write_bytes(b"ne")
        raise RuntimeError("half-way")
