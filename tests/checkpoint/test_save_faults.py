"""Faults while a checkpoint is saved, and damage then: slices of `scripts/soak checkpoint`."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from save_faults import campaign
from save_faults.disks import CountingDisk, FullDisk
from save_faults.states import save, wrong_with

from splitlearn_core.checkpoint.files import folders
from splitlearn_core.checkpoint.files.disk import Disk
from splitlearn_core.checkpoint.resume import load_checkpoint
from splitlearn_core.errors import CheckpointError, NoCheckpointError, StorageError


def test_a_disk_that_is_full_at_a_call(tmp_path: Path) -> None:
    template = tmp_path / "template"
    calls = campaign._prepared(template)
    kinds = ("make_folder", "create", "write", "sync_file", "sync_folder", "rename")
    assert set(kinds) <= set(calls)

    trials = []
    # every third; the others are for the campaign
    for fatal in range(0, len(calls), 3):
        folder = tmp_path / str(fatal)
        shutil.copytree(template, folder)
        trials.append(campaign.full_at(folder, fatal, calls))

    assert not [trial for trial in trials if trial[1]]


@pytest.mark.parametrize(
    ("kind", "count"), [(campaign.kills, 10), (campaign.size_limits, 4), (campaign.damages, 25)]
)
def test_a_slice_of_the_campaign(tmp_path: Path, kind: Any, count: int) -> None:
    rng = random.Random(7)  # noqa: S311 - no secret
    with contextlib.closing(kind(tmp_path / "run", rng)) as trials:
        found = list(itertools.islice(trials, count))

    assert not [trial for trial in found if trial[1]]


def test_the_message_of_a_full_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)
    calls = campaign._prepared(tmp_path / "other")

    with pytest.raises(StorageError, match=r"No space left.*as they were\.  Make room") as caught:
        save(tmp_path, 2, FullDisk(calls.index("write")))

    assert str(tmp_path) in str(caught.value)
    assert caught.value.errno == 28
    assert not list(tmp_path.glob(".saving*"))


def test_too_little_room_is_found_out_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    disk = CountingDisk()

    with pytest.raises(StorageError, match="5 bytes are free, and the checkpoint has"):
        save(tmp_path, 1, disk)

    assert "write" not in disk.calls


def test_a_save_that_lives_is_not_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    alive = folders.begin(Disk(), tmp_path)
    dead = tmp_path / ".saving-1-dead"
    dead.mkdir()
    (dead / "model.json").write_text("{}")
    (dead / ".lock").touch()

    save(tmp_path, 2)

    assert alive.path.exists()
    assert not dead.exists()
    alive.discard()


def test_two_saves_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    one, other = folders.begin(Disk(), tmp_path), folders.begin(Disk(), tmp_path)

    names = [other.publish(7).path.name, one.publish(7).path.name]

    assert names == ["000001-step-7", "000002-step-7"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save(folder, step)
    return folder


@pytest.fixture
def newest(two: Path, tmp_path: Path) -> Path:
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run" / "000002-step-2"


def test_a_flipped_bit_is_told_with_its_tensor(newest: Path) -> None:
    path = newest / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 4
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged between bytes 0 and"):
        wrong_with(newest.parent, {2})


def test_a_damaged_newest_falls_back_only_when_asked(newest: Path) -> None:
    (newest / "optimizer.json").unlink()

    with pytest.raises(CheckpointError, match=r"optimizer\.json can't be read: No such file"):
        wrong_with(newest.parent, {1, 2})
    state = load_checkpoint(newest.parent, fallback=True, skip=("model", "optimizer"))

    # what is skipped is not read, so that this one is whole still
    assert state.step == 2
    (newest / "training.json").unlink()
    state = load_checkpoint(newest.parent, fallback=True, skip=("model", "optimizer"))
    assert state.step == 1
    assert "000002-step-2 is damaged and was passed over" in state.notes[0]
    assert load_checkpoint(newest, fallback=True, skip=("model", "optimizer")).step == 1


def test_no_checkpoint_is_whole(newest: Path) -> None:
    for folder in newest.parent.glob("0*"):
        (folder / "manifest.json").write_text("{")

    with pytest.raises(NoCheckpointError, match=r"is whole: .*000002-step-2.*000001-step-1"):
        load_checkpoint(newest.parent, fallback=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2; this release reads 1.*release that wrote it"),
        ({"format": "other"}, "no manifest of a training checkpoint"),
        ({"versions": {"torch": "0"}}, "not what its own hash says"),
        ({"files": {}}, "not what its own hash says"),
    ],
)
def test_a_manifest_of_another_kind(newest: Path, change: dict[str, Any], message: str) -> None:
    path = newest / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(CheckpointError, match=message) as caught:
        wrong_with(newest.parent, {2})
    assert str(path) in str(caught.value)


def test_a_manifest_can_not_lead_elsewhere(newest: Path) -> None:
    from splitlearn_core.checkpoint.files import manifest  # noqa: PLC0415

    record = manifest.FileRecord(0, 8, ())
    (newest / "manifest.json").write_text(manifest.to_text({"../training.json": record}, {}))

    with pytest.raises(CheckpointError, match=r"'\.\./training\.json' is no file of a checkpoint"):
        wrong_with(newest.parent, {2})
