"""A disk that fills up half-way: what is said, and that what was there is as it was."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub

from splitlearn_core import SplitModel
from splitlearn_core.errors import StorageError
from splitlearn_core.factory import load_component
from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_source import open_hub_source
from splitlearn_core.split_checkpoint import split_checkpoint

LIMIT = 20_000


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond some bytes: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_saving_a_part_leaves_nothing(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    part = load_component(make_checkpoint("llama").path, "trunk", [2, 4])

    with full_disk(), pytest.raises(StorageError, match=rf"saved in {tmp_path}.*Make room"):
        part.save(tmp_path)

    assert not contents(tmp_path)


def test_the_part_that_was_there_is_as_it_was(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path)
    before = contents(tmp_path)
    other = load_component(make_checkpoint("qwen2").path, "trunk", [1, 5])

    with full_disk(), pytest.raises(StorageError):
        other.save(tmp_path)

    assert contents(tmp_path) == before
    assert SplitModel.load(tmp_path, verify_hashes=True).end_layer == 4


def test_splitting_leaves_nothing(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    path = make_checkpoint("llama").path

    with full_disk(), pytest.raises(StorageError, match=r"parts.*Make room") as caught:
        split_checkpoint(path, [2, 4], tmp_path / "parts")

    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_whole_file_from_a_hub_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    torch.save({"weight": torch.ones(LIMIT)}, model / "pytorch_model.bin")
    with LoopbackHub({"someone/model": model}).run() as hub:
        files = HubFiles("someone/model", tmp_path / "ours", endpoint=hub.address)
        with full_disk(), pytest.raises(StorageError, match=r"pytorch_model\.bin can't be written"):
            open_hub_source(files)
        assert not list((tmp_path / "ours").rglob("blobs/*"))
        assert open_hub_source(files).info("weight").shape == (LIMIT,)
