"""A run that is interrupted and gone on with is the run that was not interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import Network, Run
from torch import nn

from splitlearn_core.checkpoint.resume import Checkpointer, load_checkpoint, save_checkpoint
from splitlearn_core.errors import (
    CheckpointError,
    NoCheckpointError,
    UnsavableStateError,
    WorldSizeError,
)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(run.model.state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("cut", [1, 6, 7, 12])
def test_the_same_steps_to_the_bit(tmp_path: Path, cut: int) -> None:
    """Six steps make an epoch: the cuts lie amid one, at its end, and in the next."""
    whole = Run()
    whole.train(15)
    checkpointer = Checkpointer(tmp_path)
    first = Run()
    first.train(cut)
    first.save(checkpointer)

    again = Run(seed=99)
    state = again.load(checkpointer)
    again.train(15 - cut)

    assert state.step == cut
    assert state.notes == ()
    assert state.consumed_samples == 6 * cut
    assert again.losses == whole.losses
    assert equal(weights(again), weights(whole))


def test_a_save_disturbs_nothing(tmp_path: Path) -> None:
    whole = Run()
    whole.train(9)
    saved = Run()
    for _ in range(9):
        saved.train(1)
        with Checkpointer(tmp_path, keep_last=1) as checkpointer:
            saved.save(checkpointer, background=saved.step % 2 == 0)

    # `train` begins an epoch's rest anew each time, so this shows that too
    assert saved.losses == whole.losses
    assert equal(weights(saved), weights(whole))


def test_workers_load_no_sample_twice_and_skip_none(tmp_path: Path) -> None:
    whole = Run(workers=2)
    whole.train(10)
    first = Run(workers=2)
    first.train(4)
    first.save(Checkpointer(tmp_path))

    again = Run(workers=2)
    again.load(Checkpointer(tmp_path))
    again.train(6)

    assert again.losses == whole.losses


def test_what_was_consumed_is_not_loaded_again(tmp_path: Path) -> None:
    first = Run()
    first.train(4)
    first.save(Checkpointer(tmp_path))
    again = Run()
    again.load(Checkpointer(tmp_path))

    again.train(2)

    assert len(again.samples.asked) == 12
    assert not set(again.samples.asked) & set(first.samples.asked)


def test_a_save_amid_a_step_is_refused(tmp_path: Path) -> None:
    run = Run()
    next(run.sampler.track(run.loader))

    with pytest.raises(RuntimeError, match="1 of the 2 forwards of a step are done"):
        run.save(Checkpointer(tmp_path))
    assert not list(tmp_path.iterdir())


def test_everything_else_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(2, 2)

    path = save_checkpoint(
        tmp_path,
        step=12,
        epoch=3,
        consumed_samples=96,
        model=model,
        generator=generator,
        run_id="abc123",
        rank_values={"seen": (1, 2)},
        best=float("inf"),
        nothing=None,
        table={1: torch.arange(3), "b": [None, (1.5,)]},
    )
    expected = torch.rand(2, generator=generator)
    generator.manual_seed(8)
    state = load_checkpoint(tmp_path, model=nn.Linear(2, 2), generator=generator)

    assert state.path == path
    assert (state.step, state.epoch, state.consumed_samples) == (12, 3, 96)
    assert (state.run_id, state.rank_values) == ("abc123", ({"seen": (1, 2)},))
    assert (state.world_size, state.saved_world_size) == (1, 1)
    assert state.values["best"] == float("inf")
    assert state.values["nothing"] is None
    assert torch.equal(state.values["table"][1], torch.arange(3))
    assert state.values["table"]["b"] == [None, (1.5,)]
    assert torch.equal(torch.rand(2, generator=generator), expected)
    assert state.versions["torch"] == torch.__version__
    assert state.created.endswith("+00:00")


def test_weights_are_plain_safetensors_by_their_names(tmp_path: Path) -> None:
    model = Network()
    path = save_checkpoint(tmp_path, step=1, model=model)

    found = load_file(path / "model.safetensors")

    assert "last.weight" not in found  # tied: stored once
    assert torch.equal(found["first.weight"], model.first.weight)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save_checkpoint(tmp_path, step=1, model=torch.compile(model, backend="eager"))
    plain = nn.Linear(3, 3)

    load_checkpoint(tmp_path, model=plain)

    assert torch.equal(plain.weight, model.weight)


def test_an_adapter_is_saved_without_what_is_frozen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 2))
    model[0].requires_grad_(False)
    path = save_checkpoint(tmp_path, step=1, adapter=model)
    other = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 2))
    other[0].requires_grad_(False)
    frozen = other[0].weight.clone()

    load_checkpoint(path, adapter=other)

    assert set(load_file(path / "adapter.safetensors")) == {"1.weight", "1.bias"}
    assert torch.equal(other[1].weight, model[1].weight)
    assert torch.equal(other[0].weight, frozen)


def test_moments_keep_their_dtype(tmp_path: Path) -> None:
    """Torch's own load would cast float32 moments to the dtype of bfloat16 weights."""
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    moments = optimizer.state[model.weight]
    moments["exp_avg"] = moments["exp_avg"].float() + 1e-5
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    other = nn.Linear(4, 4, dtype=torch.bfloat16)
    again = torch.optim.AdamW(other.parameters())

    load_checkpoint(tmp_path, model=other, optimizer=again)

    assert torch.equal(again.state[other.weight]["exp_avg"], moments["exp_avg"])
    assert again.state[other.weight]["exp_avg"].dtype == torch.float32


def test_keep_last_and_latest(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "deep" / "run", keep_last=2)
    assert checkpointer.latest() is None
    for step in (10, 20, 5):
        checkpointer.save(step=step, value=step)

    assert [c.path.name for c in checkpointer.checkpoints()] == ["000002-step-20", "000003-step-5"]
    assert checkpointer.latest() == tmp_path / "deep" / "run" / "000003-step-5"
    assert checkpointer.load().step == 5
    assert checkpointer.load(tmp_path / "deep/run/000002-step-20").values["value"] == 20


def test_one_that_is_being_read_is_not_deleted(tmp_path: Path) -> None:
    from splitlearn_core.checkpoint.files import folders  # noqa: PLC0415

    checkpointer = Checkpointer(tmp_path, keep_last=1)
    first = checkpointer.save(step=1)
    assert first is not None
    with folders.reading(first):
        checkpointer.save(step=2)
        assert first.exists()
    checkpointer.save(step=3)

    assert [c.step for c in checkpointer.checkpoints()] == [3]


# --- What does not fit -------------------------------------------------------------------------


def test_another_architecture_changes_nothing(tmp_path: Path) -> None:
    run = Run()
    run.train(2)
    run.save(Checkpointer(tmp_path))
    other = Run(seed=4)
    other.model = nn.Sequential(nn.Linear(6, 6))
    before = other.model[0].weight.clone()
    scheduler = dict(other.scheduler.state_dict())

    with pytest.raises(CheckpointError, match=r"000001-step-2 is not of this model: not in") as e:
        other.load(Checkpointer(tmp_path))

    assert "0.weight" in str(e.value)
    assert "first.weight" in str(e.value)
    assert torch.equal(other.model[0].weight, before)
    assert other.scheduler.state_dict() == scheduler
    assert other.sampler.consumed == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(3, 4), r"weight is float32 \[3, 3\] in the checkpoint and float32 \[4"),
        (lambda: nn.Linear(3, 3).bfloat16(), "is float32 .* in the checkpoint and bfloat16"),
        (lambda: nn.Linear(3, 3, bias=False), "not in the model here: bias"),
    ],
)
def test_other_shapes_and_dtypes(tmp_path: Path, other: Any, message: str) -> None:
    save_checkpoint(tmp_path, step=1, model=nn.Linear(3, 3))

    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, model=other())


def test_other_groups_of_parameters(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save_checkpoint(tmp_path, step=1, optimizer=torch.optim.AdamW(model.parameters()))
    groups = [{"params": [p]} for p in model.parameters()]

    with pytest.raises(CheckpointError, match=r"groups of \[2\] parameters.*groups of \[1, 1\]"):
        load_checkpoint(tmp_path, optimizer=torch.optim.AdamW(groups))
    with pytest.raises(CheckpointError, match=r"saved by a torch\.optim\.adamw.*is a .*SGD"):
        load_checkpoint(tmp_path, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(CheckpointError, match=r"parameter 0 of group 0 was \[3, 3\].*is \[3\]"):
        load_checkpoint(tmp_path, optimizer=torch.optim.AdamW([model.bias, model.weight]))


def test_names_that_were_not_saved_and_not_given(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, best=1)

    with pytest.raises(CheckpointError, match="has optimizer, too: give what is to have"):
        load_checkpoint(tmp_path, model=model)
    with pytest.raises(CheckpointError, match="does not have scheduler; it has best, model"):
        load_checkpoint(tmp_path, model=model, optimizer=optimizer, scheduler=model)
    with pytest.raises(CheckpointError, match=r"best .*is a plain value"):
        load_checkpoint(tmp_path, model=model, optimizer=optimizer, best=2)
    assert load_checkpoint(tmp_path, model=model, skip=["optimizer"]).step == 1


def test_something_refuses_its_state_and_nothing_is_changed(tmp_path: Path) -> None:
    class Picky:
        def __init__(self) -> None:
            self.value, self.refuses = 1, False

        def state_dict(self) -> dict[str, int]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, int]) -> None:
            if self.refuses and state["value"] == 1:
                raise KeyError("no")
            self.value = state["value"]

    model, first, second = nn.Linear(2, 2), Picky(), Picky()
    save_checkpoint(tmp_path, step=1, model=model, first=first, second=second)
    other = nn.Linear(2, 2)
    before = other.weight.clone()
    first.value = second.value = 2
    second.refuses = True

    with pytest.raises(CheckpointError, match="second does not take its state: KeyError"):
        load_checkpoint(tmp_path, model=other, first=first, second=second)

    assert (first.value, second.value) == (2, 2)
    assert torch.equal(other.weight, before)


def test_other_data(tmp_path: Path) -> None:
    from splitlearn_core.checkpoint.training.sampler import ResumableSampler  # noqa: PLC0415

    save_checkpoint(tmp_path, step=0, sampler=ResumableSampler(40, 2))

    with pytest.raises(CheckpointError, match="length 40, and this one has 41"):
        load_checkpoint(tmp_path, sampler=ResumableSampler(41, 2))
    with pytest.raises(WorldSizeError, match="took 2 samples in a forward, and takes 4"):
        load_checkpoint(tmp_path, sampler=ResumableSampler(40, 4))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"step": -1}, ValueError, "step must be a whole number from 0 on"),
        ({"step": 1, "training": 1}, ValueError, "training is a name of the checkpoint's own"),
        ({"step": 1, "hook": print}, UnsavableStateError, r"hook \(builtin_function"),
        ({"step": 1, "rank_values": {1: print}}, UnsavableStateError, r"rank_values\['values'\]"),
    ],
)
def test_bad_arguments_write_nothing(
    tmp_path: Path, given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        save_checkpoint(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="there is no such folder"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(NoCheckpointError, match="no folder there is called NUMBER-step-STEP"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, step=3)
    with pytest.raises(NoCheckpointError, match="beside it there are: 000001-step-3"):
        load_checkpoint(tmp_path / "000009-step-9")
    with pytest.raises(ValueError, match="keep_last must be 1 or more"):
        Checkpointer(tmp_path, keep_last=0)


def test_the_training_file_is_json(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=3, run_id="r")

    training = json.loads((path / "training.json").read_text())

    assert (training["step"], training["run_id"], training["world_size"]) == (3, "r", 1)
