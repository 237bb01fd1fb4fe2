"""What MiniMind's lm_checkpoint wrote is gone on with, its optimizer parameter by parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from minimind_reference import Reference

from splitlearn_core.checkpoint import load_minimind_resume
from splitlearn_core.errors import CheckpointError, WorldSizeError
from splitlearn_core.quickstart import load_full_model


def training_file(folder: Path, *, world_size: int = 1, **more: Any) -> Path:
    """Write the file; each moment is full of its weight's place among MiniMind's."""
    state = Reference().state(dtype=torch.float16)
    trained = [name for name in state if name != "lm_head.weight"]
    assert len(trained) == len(state) - 1
    moments = {
        number: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full(state[name].shape, float(number)),
            "exp_avg_sq": torch.full(state[name].shape, float(number)),
        }
        for number, name in enumerate(trained)
    }
    group = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=3e-4).state_dict()
    optimizer = {
        "state": moments,
        "param_groups": [{**group["param_groups"][0], "params": list(range(len(trained)))}],
    }
    path = folder / "full_sft_64_resume.pth"
    data = {"model": state, "optimizer": optimizer, "epoch": 1, "step": 1000}
    torch.save({**data, "world_size": world_size, "wandb_id": "abc", **more}, path)
    return path


def fresh(path: Path) -> torch.nn.Module:
    model, _ = load_full_model(path, dtype="float32")
    model.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.train()


def test_every_parameter_gets_its_own_moments(tmp_path: Path) -> None:
    path = training_file(tmp_path)
    model = fresh(path)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": decayed}])

    state = load_minimind_resume(path, model=model, optimizer=optimizer)

    assert (state.epoch, state.step, state.run_id) == (1, 1000, "abc")
    assert any("rounded to float16" in note for note in state.notes)
    stored = torch.load(path, weights_only=True)["model"]
    names = [name for name in stored if name != "lm_head.weight"]
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]["exp_avg"]
        assert bool((moments == names.index(name)).all()), name
        assert torch.equal(parameter, stored[name].float())
    assert optimizer.param_groups[1]["lr"] == 3e-4
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()


def test_another_number_of_ranks(tmp_path: Path) -> None:
    path = training_file(tmp_path, world_size=4)
    model = fresh(path)

    with pytest.raises(WorldSizeError, match="saved by 4 ranks"):
        load_minimind_resume(path, model=model)
    state = load_minimind_resume(path, model=model, on_world_change="constant_batch_per_rank")

    assert state.step == 4000
    assert "not asked for: optimizer" in state.notes[-1]


def test_a_scaler_and_what_was_not_saved(tmp_path: Path) -> None:
    scale = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler = torch.amp.GradScaler("cpu")
    path = training_file(tmp_path, scaler={**scale, "growth_interval": 3, "_growth_tracker": 1})
    model = fresh(path)

    load_minimind_resume(path, model=model, scaler=scaler)

    assert scaler.get_scale() == 8.0
    with pytest.raises(CheckpointError, match="no state of scheduler; it has optimizer, scaler"):
        load_minimind_resume(path, model=model, scheduler=scaler)


def test_an_optimizer_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = training_file(tmp_path)
    model = fresh(path)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])

    with pytest.raises(CheckpointError, match=r"no optimizer's state of ''.*this model's"):
        load_minimind_resume(path, model=model, optimizer=optimizer)
    few = torch.optim.AdamW(list(model.parameters())[:3])
    with pytest.raises(CheckpointError, match=r"had \d+ parameters, this one has 3"):
        load_minimind_resume(path, model=model, optimizer=few)

    assert all(not bool(parameter.any()) for parameter in model.parameters())
