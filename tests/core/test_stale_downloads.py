"""What downloads left in the cache of parts, and nobody goes on with, is removed after a while."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from download_child import FILE, OPTIONS, REPO
from huggingface_hub import constants
from loopback_hub import COMMIT, LoopbackHub
from safetensors.torch import save_file

from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_source import open_hub_source
from splitlearn_core.loading.part_cache import locked
from splitlearn_core.loading.stale import STALE_SECONDS, remove_stale

OLD = STALE_SECONDS + 3600


def leave(folder: Path, *names: str, age: float = OLD) -> list[Path]:
    """Leave files that were touched last so many seconds ago."""
    paths = [folder / name for name in names]
    then = time.time() - age
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (then, then))
    return paths


def present(paths: list[Path]) -> list[str]:
    return [path.name for path in paths if path.exists()]


def test_a_download_that_ended_long_ago_goes_and_all_else_stays(tmp_path: Path) -> None:
    old = leave(tmp_path / "m" / "c", "a.partial", "a.journal", "a.lock", "b.lock")
    old += leave(tmp_path / "m" / "c", ".b.journal.77.tmp", "headers/.f.header.77.tmp")
    kept = leave(tmp_path / "m" / "c", "b.safetensors", "headers/f.header")
    kept += leave(tmp_path / "m" / "d", "c.partial", "c.journal", ".x.tmp", age=3600)

    remove_stale(tmp_path)

    assert not present(old)
    assert present(kept) == [path.name for path in kept]


def test_one_of_its_files_that_is_new_keeps_a_download(tmp_path: Path) -> None:
    paths = leave(tmp_path, "a.partial", "a.lock") + leave(tmp_path, "a.journal", age=60)

    remove_stale(tmp_path)

    assert len(present(paths)) == 3


def test_what_somebody_is_fetching_stays(tmp_path: Path) -> None:
    paths = leave(tmp_path, "a.partial", "a.journal", "a.lock")

    with locked(tmp_path / "a.safetensors", lambda: None):
        remove_stale(tmp_path)
        assert len(present(paths)) == 3

    remove_stale(tmp_path)
    assert not present(paths)


def test_a_cache_that_is_not_there(tmp_path: Path) -> None:
    remove_stale(tmp_path / "absent")


def test_a_fetch_clears_what_another_model_s_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    old = leave(tmp_path / "ours" / "parts" / "other" / COMMIT, "a.partial", "a.journal")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"weight": torch.ones(100)}, model / FILE)

    with LoopbackHub({REPO: model}).run() as hub:
        files = HubFiles(REPO, tmp_path / "ours", endpoint=hub.address)
        open_hub_source(files, OPTIONS).prepare(["weight"])

    assert not present(old)
