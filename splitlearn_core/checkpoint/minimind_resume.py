"""Going on from what MiniMind's `lm_checkpoint` wrote (`…_resume.pth`).

An optimizer's state names parameters by their place in the model that wrote it.  Hugging Face's
classes have theirs in another order, with shapes that often agree, so that the state must be given
by name: the order of the file's weights is that of MiniMind's parameters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitlearn_core.checkpoint.load import load_weights
from splitlearn_core.checkpoint.minimind import hugging_face_name
from splitlearn_core.checkpoint.models.model_state import modules_of
from splitlearn_core.checkpoint.models.wrappers import plain_name
from splitlearn_core.checkpoint.training.exchange import Ranks
from splitlearn_core.checkpoint.training.giving import TrainingState
from splitlearn_core.checkpoint.training.world import Policy, Progress, convert
from splitlearn_core.checkpoint.training_file import TrainingFile, read_training_file
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.messages import in_one_line, short

_HALF = {torch.float16, torch.bfloat16}


def load_minimind_resume(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    on_world_change: Policy | None = None,
    **states: Any,
) -> TrainingState:
    """Give a model, its optimizer and more the state that a `…_resume.pth` has of them.

    Args:
        path: The file; nothing in it is run.
        model: MiniMind's own, or Hugging Face's class for it; wrapped or not.
        optimizer: Of all the model's parameters, in any order and groups.
        on_world_change: See `Checkpointer.load`; `step` counts batches of a rank within the epoch.
        **states: What else is to have its state: `scaler`, …

    Returns:
        Where training goes on; what is not exact is in its notes.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no such file.
        CheckpointError: (a `ValueError`) It is damaged, or does not fit; nothing is changed then.
        WorldSizeError: (a `ValueError`) The number of ranks is another, and no policy is named.
    """
    file = read_training_file(path)
    ranks = Ranks.here()
    converted = convert(Progress(file.step, file.world_size), ranks.world_size, on_world_change)
    given = dict(states) | ({} if optimizer is None else {"optimizer": optimizer})
    if absent := given.keys() - file.states.keys():
        raise CheckpointError(
            f"{file.path} has no state of {listed(absent)}; it has {listed(file.states) or 'none'}"
        )
    state = None if optimizer is None else _optimizer_state(file, model, optimizer)
    load_weights(model, path)
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)
    for name, thing in states.items():
        try:
            thing.load_state_dict(dict(file.states[name]))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file.path}: {name} does not take its state: {in_one_line(error)}"
            ) from error
    left = file.states.keys() - given.keys()
    return _training_state(
        file, converted.progress.step, ranks, (*converted.notes, *_notes(file, left))
    )


def _notes(file: TrainingFile, left: Any) -> list[str]:
    notes = ["no random states and no place in the data's order were saved: steps differ"]
    if halves := {t.dtype for t in file.model.values()} & _HALF:
        names = listed(str(dtype).removeprefix("torch.") for dtype in halves)
        notes.append(f"weights were rounded to {names} when they were saved")
    if left:
        notes.append(f"not asked for: {listed(left)}")
    return notes


def _training_state(
    file: TrainingFile, step: int, ranks: Ranks, notes: tuple[str, ...]
) -> TrainingState:
    path = Path(file.path)
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return TrainingState(
        path=path,
        step=step,
        epoch=file.epoch,
        consumed_samples=None,
        world_size=ranks.world_size,
        saved_world_size=file.world_size,
        batches=None,
        values=file.values,
        rank_values=(),
        run_id=file.run_id,
        versions={},
        created=written.isoformat(timespec="seconds"),
        notes=notes,
    )


# --- The optimizer's state, by name ------------------------------------------------------------


def _optimizer_state(
    file: TrainingFile, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the optimizer's state for the order in which it has its parameters here.

    Raises:
        CheckpointError: (a `ValueError`) It does not fit the model or the optimizer.
    """
    saved: Any = file.states["optimizer"]
    try:
        numbers = [n for group in saved["param_groups"] for n in group["params"]]
        by_name = dict(zip(_names(file, len(numbers)), numbers, strict=True))
        groups = [_settings(group) for group in saved["param_groups"]]
        states: Mapping[int, Mapping[str, Any]] = saved["state"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file.path}: its optimizer's state is damaged: {in_one_line(error)}"
        ) from error
    if len(groups) != 1:
        raise CheckpointError(
            f"{file.path}: its optimizer had {len(groups)} groups of parameters; MiniMind's has one"
        )
    names = {
        id(parameter): hugging_face_name(plain_name(name))
        for module in modules_of(model)
        for name, parameter in module.named_parameters()
    }
    return _renumbered(file, optimizer, names, by_name, groups[0], states)


def _renumbered(
    file: TrainingFile,
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    by_name: Mapping[str, int],
    settings: Mapping[str, Any],
    states: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    """Give each parameter of the optimizer, by its name, the state that it had."""
    found: dict[int, dict[str, Any]] = {}
    groups = []
    position = 0
    for group in optimizer.param_groups:
        numbers = range(position, position + len(group["params"]))
        position += len(numbers)
        groups.append({**settings, "params": list(numbers)})
        for number, parameter in zip(numbers, group["params"], strict=True):
            name = names.get(id(parameter), "")
            if name not in by_name:
                raise CheckpointError(
                    f"{file.path} has no optimizer's state of {short(name)}; it has"
                    f" {listed(by_name, 5)}: give an optimizer of this model's parameters"
                )
            found[number] = _checked(file, name, parameter, states.get(by_name[name], {}))
    if position != len(by_name):
        raise CheckpointError(
            f"{file.path}: its optimizer had {len(by_name)} parameters, this one has {position}"
        )
    return {"state": found, "param_groups": groups}


def _checked(
    file: TrainingFile, name: str, parameter: torch.Tensor, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a parameter's state in memory of its own; moments must have its shape."""
    own = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{file.path}: {key} of {name} is {list(value.shape)}, and the parameter"
                    f" {list(parameter.shape)}"
                )
            own[key] = value.clone()
        else:
            own[key] = value
    return own


def _names(file: TrainingFile, count: int) -> list[str]:
    """Return the names of MiniMind's parameters in its order, the tied one at its first place."""
    names = [hugging_face_name(name) for name in file.model]
    if len(names) == count + 1 and "lm_head.weight" in names:
        names.remove("lm_head.weight")
    if len(names) != count:
        raise CheckpointError(
            f"{file.path}: its optimizer had {count} parameters, and there are {len(names)} weights"
        )
    return names


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
