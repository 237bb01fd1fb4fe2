"""Files that a training script goes on from: weights, and what trained them (`…_resume.pth`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import CheckpointError
from splitlearn_core.loading.torch_files import is_training_file, load_torch_file, plain_tensors
from splitlearn_core.messages import short
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os

    import torch

_COUNTS = {"epoch": 0, "step": 0, "world_size": 1}


@dataclass(frozen=True)
class TrainingFile:
    """What MiniMind's `lm_checkpoint` writes; tensors stay mapped from the file.

    Attributes:
        path: The file.
        model: The weights by name, as they are stored: in half precision, mostly.
        states: The `state_dict` of everything else that had one: `optimizer`, `scaler`,
            `scheduler`, …
        epoch: The epoch that was under way.
        step: The step within it.
        world_size: Ranks at that time.
        run_id: The tracker's (`wandb_id`), if there was one.
        values: Whatever else was written.
    """

    path: str
    model: Mapping[str, torch.Tensor]
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    world_size: int = 1
    run_id: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


def read_training_file(path: str | os.PathLike[str]) -> TrainingFile:
    """Read a training script's file; no code in it is run (`weights_only`).

    The weights can be put into a model with `load_weights(model, path)`; to go on training, use
    `load_minimind_resume`: an optimizer's state numbers parameters in the order of MiniMind's own
    model, which transformers' does not have.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no such file.
        CheckpointError: (a `ValueError`) It is damaged, holds more than plain values and tensors,
            or no weights beside a state.
    """
    place = user_path(path)
    loaded = load_torch_file(place)
    if not is_training_file(loaded):
        raise CheckpointError(
            f"{place} is no file that training goes on from: it has no `model` beside an"
            " `optimizer`, `epoch` or `step`; weights alone are for load_weights"
        )
    rest = {str(key): value for key, value in loaded.items() if key != "model"}
    counts = {
        name: _count(rest.pop(name, usual), name, str(place)) for name, usual in _COUNTS.items()
    }
    run_id = rest.pop("wandb_id", None)
    states = {name: value for name, value in rest.items() if isinstance(value, dict)}
    return TrainingFile(
        path=str(place),
        model=plain_tensors(loaded["model"], place),
        states=states,
        run_id=None if run_id is None else str(run_id),
        values={name: value for name, value in rest.items() if name not in states},
        **counts,
    )


def _count(value: object, name: str, where: str) -> int:
    """Return a number of things, which a damaged file may have anything for."""
    if isinstance(value, bool) or not isinstance(value, int) or value < (name == "world_size"):
        raise CheckpointError(f"{where}: {name} is {short(value)}, no number of anything")
    return value
