"""Two ranks save and go on together: each rank is a process of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Run, run_ranks
from resume_checks import sharded_model, sharded_step

from splitlearn_core.checkpoint.resume import load_checkpoint, save_checkpoint
from splitlearn_core.checkpoint.training.sampler import ResumableSampler
from splitlearn_core.errors import CheckpointError, WorldSizeError

DEATH = ("check_z_death",)
CHECKS = (
    "check_each_rank_gets_its_own_back",
    "check_a_disk_that_is_full",
    "check_a_full_disk_in_the_background",
    "check_a_save_that_takes_longer_than_the_timeout",
    "check_a_rank_that_can_not_save",
    "check_a_rank_that_does_not_come",
    "check_damage_that_one_rank_sees",
    "check_a_changed_number_of_ranks",
    "check_a_model_in_shares",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Any]]:
    """What each rank answered to each check."""
    sampler = ResumableSampler(64, 2, accumulation=4)
    tracked = sampler.track([None] * 20)  # type: ignore[arg-type]
    for _ in range(12):
        next(tracked)
    save_checkpoint(folder / "single", step=3, sampler=sampler)
    settings = {"single": str(folder / "single")}
    runs = [
        Run(str(folder / "both"), ["resume_checks"], 2, settings, CHECKS),
        *(
            Run(str(folder / f"dies-{n}"), ["resume_checks"], 2, {"dies": n}, DEATH, dying=n)
            for n in range(2)
        ),
    ]
    run_ranks(folder, runs)
    answers = runs[0].answers()
    for answer in answers:
        assert not [entry["error"] for entry in answer.values() if "error" in entry]
    survivors = [run.answers()[0] for run in runs[1:]]
    return {
        **{name: [answer[name]["value"] for answer in answers] for name in CHECKS},
        "check_z_death": [answer["check_z_death"] for answer in survivors],
    }


def test_each_rank_gets_its_own_back(folder: Path, found: dict[str, list[Any]]) -> None:
    one, other = found["check_each_rank_gets_its_own_back"]

    assert one["path"] == other["path"] == str(folder / "both" / "own" / "000001-step-4")
    assert one["drawn"] == one["again"] != other["drawn"] == other["again"]
    assert one["weights"]
    assert other["weights"]
    assert one["values"] == other["values"] == [{"rank": 0}, {"rank": 1}]
    assert one["background"] is other["background"] is None
    assert one["later"] == other["later"] == str(folder / "both" / "own" / "000002-step-5")
    assert one["notes"] == other["notes"] == []


@pytest.mark.parametrize(
    "check", ["check_a_disk_that_is_full", "check_a_full_disk_in_the_background"]
)
def test_all_hear_of_a_full_disk(found: dict[str, list[Any]], check: str) -> None:
    one, other = found[check]

    assert one.startswith("StorageError: ")
    assert "No space left" in one
    assert other.startswith("RankLostError: the save of step 1 failed on rank 0: StorageError: ")


def test_who_gets_on_is_waited_for(folder: Path, found: dict[str, list[Any]]) -> None:
    path = str(folder / "both" / "slow" / "000001-step-1")

    assert found["check_a_save_that_takes_longer_than_the_timeout"] == [path, path]


def test_a_rank_that_can_not_save_stops_all(folder: Path, found: dict[str, list[Any]]) -> None:
    one, other = found["check_a_rank_that_can_not_save"]

    assert one[0].startswith("RankLostError: the save of step 1 failed on rank 1: Unsavable")
    assert other[0].startswith("UnsavableStateError: rank_values['values']")
    assert one[1] == other[1] == str(folder / "both" / "bad" / "000001-step-2")


def test_a_rank_that_does_not_come_is_named(found: dict[str, list[Any]]) -> None:
    one, other = found["check_a_rank_that_does_not_come"]

    assert "rank 1 did not come to the save of step 1 within 1 s" in one["errors"][0]
    assert "rank 0 did not end the save of step 1 within 6 s" in other["errors"][0]
    assert one["seconds"] < 30


def test_ranks_fall_back_together(found: dict[str, list[Any]]) -> None:
    one, other = found["check_damage_that_one_rank_sees"]

    assert "can't be read on rank 1: CheckpointError" in one["error"]
    assert other["error"].startswith("CheckpointError: ")
    assert one["step"] == other["step"] == 1
    assert "passed over (rank 1: CheckpointError" in one["notes"][0]


def test_a_changed_number_of_ranks(found: dict[str, list[Any]]) -> None:
    one, other = found["check_a_changed_number_of_ranks"]

    assert "'constant_global_batch'" in one["None"] == other["None"]
    kept, converted = one["constant_global_batch"], one["constant_batch_per_rank"]
    assert (kept["step"], kept["accumulation"], kept["consumed"]) == (3, 2, 24)
    assert (converted["step"], converted["accumulation"]) == (1, 4)
    assert "1 of the 2 batches of a step are consumed already" in converted["notes"][1]
    both = kept["next"] + other["constant_global_batch"]["next"]
    assert len(set(both)) == 4
    assert "rank 1 was not there" in other["constant_global_batch"]["notes"][-1]
    assert "rank 0 of 1" in kept["notes"][-1]


def test_what_two_ranks_saved_at_one(folder: Path, found: dict[str, list[Any]]) -> None:
    del found
    with pytest.raises(WorldSizeError, match="2 ranks, and there is 1 now"):
        load_checkpoint(folder / "both" / "own", skip=["model"])
    state = load_checkpoint(
        folder / "both" / "own", skip=["model"], on_world_change="constant_batch_per_rank"
    )
    assert (state.step, state.saved_world_size, state.world_size) == (10, 2, 1)


def test_a_model_in_shares(folder: Path, found: dict[str, list[Any]]) -> None:
    one, other = found["check_a_model_in_shares"]

    assert one["path"] == other["path"] == str(folder / "both" / "shares" / "000001-step-1")
    assert one["found"] == one["expected"] == other["found"]
    assert one["values"] == [0, 1]
    assert one["full"].startswith("StorageError: ")
    assert "failed on rank 0: StorageError" in other["full"]
    assert one["left"] == []
    assert "can't be saved in the background" in one["background"]
    assert "give the model, too" in one["optimizer"] + other["optimizer"]


def test_shares_of_two_ranks_at_one_and_damaged(
    folder: Path, found: dict[str, list[Any]], tmp_path: Path
) -> None:
    model, optimizer = sharded_model(3, shard=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    things = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    policy = {"on_world_change": "constant_global_batch"}
    shutil.copytree(folder / "both" / "shares", tmp_path / "run")

    state = load_checkpoint(tmp_path / "run", **things, **policy)

    losses = [sharded_step(model, optimizer, number) for number in (1, 2)]
    assert losses == pytest.approx(found["check_a_model_in_shares"][0]["expected"], abs=1e-6)
    assert state.step == 1
    share = next((tmp_path / "run" / "000001-step-1" / "sharded").glob("*.distcp"))
    content = bytearray(share.read_bytes())
    content[len(content) // 2] ^= 1
    share.write_bytes(content)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{share.name} is damaged between bytes 0 and"):
        load_checkpoint(tmp_path / "run", **things, **policy)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_rank_that_dies_ends_the_other(found: dict[str, list[Any]]) -> None:
    without_first, without_second = found["check_z_death"]

    assert "rank 0 did not end the save of step 1 within 6 s" in without_first["value"]
    assert "rank 1 did not come to the save of step 1 within 1 s" in without_second["value"]
