"""DCP folders: written at two ranks and read at one, the other way round, and refused."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import Checkpoint
from dcp_checks import state_of, tiny, trained
from two_ranks import TwoRanks

from splitlearn_core.errors import CheckpointError, ModelSourceError, StorageError
from splitlearn_core.factory import load_component
from splitlearn_core.sharded import check_optimizer, load_dcp, save_dcp


def test_going_on_from_a_folder_is_going_on(two_ranks: TwoRanks) -> None:
    saved, loaded = two_ranks("check_saves_at_two"), two_ranks("check_goes_on_at_two")

    assert saved == loaded
    assert saved[0] == saved[1]
    assert saved[0][1] < saved[0][0]


def test_one_process_reads_what_two_wrote(two_ranks: TwoRanks) -> None:
    model = tiny(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())

    load_dcp(two_ranks.folder / "at-two", model, optimizer)

    wanted = torch.load(two_ranks.folder / "at-two.pt", weights_only=True)
    found = state_of(model, optimizer)
    assert found.keys() == wanted.keys()
    assert any(name.endswith("exp_avg_sq") for name in wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_two_read_what_one_process_wrote(two_ranks: TwoRanks) -> None:
    for equal in two_ranks("check_reads_what_one_wrote"):
        assert len(equal) > 40
        assert all(equal.values())


def test_fsdp1_and_fsdp2_read_each_others_folders(two_ranks: TwoRanks) -> None:
    for went_on, fsdp2, fsdp1 in two_ranks("check_fsdp1_writes_and_fsdp2_reads"):
        assert went_on == pytest.approx(fsdp2, abs=1e-6)
        assert went_on == fsdp1


def test_a_part_reads_its_own_from_the_whole_models_folder(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    whole = make_checkpoint("llama").unsplit()
    optimizer = trained(whole, 1)
    save_dcp(tmp_path / "dcp", whole, optimizer)
    trunk = load_component(make_checkpoint("llama").path, "trunk", [2, 4])
    its_own = torch.optim.AdamW(trunk.parameters(), lr=0.5)

    load_dcp(tmp_path / "dcp", trunk, its_own)

    wanted = state_of(whole, optimizer)
    found = state_of(trunk, its_own)
    assert len(found) == 2 * 9 * 4
    for name, value in found.items():
        assert torch.equal(value, wanted[name.removeprefix("model.")]), name
    assert its_own.param_groups[0]["lr"] == 1e-2


def test_torch_itself_reads_the_folder(two_ranks: TwoRanks) -> None:
    model = tiny(seed=1)
    state = {"model": model.state_dict()}

    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=two_ranks.folder / "at-two")

    wanted = torch.load(two_ranks.folder / "at-two.pt", weights_only=True)
    assert all(torch.equal(value, wanted[name]) for name, value in state["model"].items())


def test_nothing_is_left_beside_a_folder(two_ranks: TwoRanks) -> None:
    assert not list(two_ranks.folder.glob(".*"))


def test_a_folder_that_holds_something_is_refused(two_ranks: TwoRanks) -> None:
    for message in two_ranks("check_a_full_folder_is_refused"):
        assert "at-two is not empty" in message


def test_an_optimizer_made_while_parameters_were_gathered_is_refused(two_ranks: TwoRanks) -> None:
    for message in two_ranks("check_an_optimizer_of_gathered_parameters_is_refused"):
        assert "the optimizer has 2 parameters that are not the model's" in message
        assert "[131, 32]" in message


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="20 parameters that are not the model's"):
        check_optimizer(tiny(), torch.optim.AdamW(tiny().parameters()))


def test_a_folder_without_metadata_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"it has no \.metadata"):
        load_dcp(tmp_path, tiny())


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("metadata ran code",))


@pytest.mark.parametrize(
    "content",
    [b"no pickle", b"", pickle.dumps(_Evil()), pickle.dumps({})],
    ids=["no pickle", "empty", "code", "other values"],
)
def test_metadata_that_are_none_are_refused_and_run_nothing(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".metadata").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"\.metadata (is damaged|holds no metadata)"):
        load_dcp(tmp_path, tiny())

    assert capsys.readouterr().out == ""


def test_values_that_are_no_tensors_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    optimizer = trained(model)
    optimizer.param_groups[0]["note"] = _Evil()
    save_dcp(tmp_path / "dcp", model, optimizer)
    del optimizer.param_groups[0]["note"]
    optimizer.param_groups[0]["note"] = "none"

    with pytest.raises(CheckpointError, match="can't be read: rank 0"):
        load_dcp(tmp_path / "dcp", model, optimizer)

    assert capsys.readouterr().out == ""


@pytest.fixture
def copied(at_one: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder, to be damaged."""
    return Path(shutil.copytree(at_one / "dcp", tmp_path / "copied"))


def test_a_file_that_is_cut_off_or_missing_is_named(copied: Path) -> None:
    [file] = copied.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name} is cut off: it has .* promises"):
        load_dcp(copied, tiny())

    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is not there"):
        load_dcp(copied, tiny())


def test_a_file_that_is_overwritten_is_named(copied: Path) -> None:
    [file] = copied.glob("*.distcp")
    file.write_bytes(b"\0" * file.stat().st_size)

    with pytest.raises(CheckpointError, match="copied can't be read: rank 0"):
        load_dcp(copied, tiny())


def test_another_model_is_refused_and_every_tensor_named(at_one: Path) -> None:
    model = tiny(tied=False)
    model.extra = torch.nn.Linear(2, 2)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(5))
    model.model.layers[0].to(torch.bfloat16)

    with pytest.raises(CheckpointError, match=r"lacks tensors.* model\.extra\.bias"):
        load_dcp(at_one / "dcp", model)

    del model.extra
    with pytest.raises(CheckpointError) as caught:
        load_dcp(at_one / "dcp", model)
    assert "model.model.norm.weight is [32], the model's is [5]" in str(caught.value)
    assert "q_proj.weight is float32, the model's is bfloat16" in str(caught.value)


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)

    with pytest.raises(StorageError, match=r"can't be saved in .*No space left on device"):
        save_dcp(tmp_path / "dcp", tiny())

    assert list(tmp_path.iterdir()) == []
