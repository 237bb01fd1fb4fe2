"""Saved parts: their hashes, and manifests that are not what was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import CheckpointError, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_core.part_folder import check_part
from splitlearn_core.part_manifest import saved_parts


def test_hashes_are_verified_when_asked_for(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    assert check_part(tmp_path).spec.name == "trunk"
    assert SplitModel.load(tmp_path, verify_hashes=True).component == "trunk"

    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    SplitModel.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
        SplitModel.load(tmp_path, verify_hashes=True)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"component": {"name": "trunk"}},
        {"component": None},
        {"files": {"../config.json": {"bytes": 1, "sha256": ""}}},
        {"files": {"config.json": {"bytes": "1", "sha256": ""}}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_manifest(
    change: dict[str, Any], make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path)
    manifest = tmp_path / "splitlearn.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))

    with pytest.raises(CheckpointError, match=r"splitlearn\.json"):
        SplitModel.load(tmp_path)


def test_two_folders_with_the_same_part_are_both_named(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path / "trunk")
    shutil.copytree(tmp_path / "trunk", tmp_path / "trunk-old")

    with pytest.raises(CheckpointError, match=r"/trunk and .*/trunk-old hold the same part"):
        saved_parts(tmp_path)


def test_a_name_that_may_mean_two_folders_is_refused(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path / "trunk.pt")
    assert SplitModel.load(tmp_path / "trunk.pt").end_layer == 4

    load_component(make_checkpoint("llama").path, "trunk", [2, 5]).save(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "trunk.pt")
    for load in (SplitModel.load, check_part):
        with pytest.raises(CheckpointError, match=r"/trunk\.pt and .*/trunk both hold"):
            load(tmp_path / "trunk.pt")

    (tmp_path / "trunk").rename(tmp_path / "elsewhere")
    assert SplitModel.load(tmp_path / "trunk.pt").end_layer == 5
