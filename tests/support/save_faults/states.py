"""A state that can be told from any other, so that a mixture of two is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from splitlearn_core.checkpoint.files.disk import Disk
from splitlearn_core.checkpoint.files.hashed_files import BLOCK_BYTES
from splitlearn_core.checkpoint.resume import Checkpointer

_NAMES = ("model", "optimizer")
# Beyond one block, so that a file is written in several pieces.
_LARGE = BLOCK_BYTES // 4 + 1000


class Holder:
    """Something with a state."""

    def __init__(self, step: int = 0, size: int = 500) -> None:
        self.state: dict[str, Any] = {
            "step": step,
            "weights": torch.full((size,), float(step)),
            "bias": torch.arange(step, step + 7),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take another."""
        self.state = state

    def is_of(self, step: int) -> bool:
        """Whether all of it is of one step."""
        return (
            self.state["step"] == step
            and bool((self.state["weights"] == step).all())
            and torch.equal(self.state["bias"], torch.arange(step, step + 7))
        )


def save(folder: Path, step: int, disk: Disk | None = None, *, large: bool = False) -> None:
    """Save the state of a step; two checkpoints are kept."""
    size = _LARGE if large else 500
    things = {name: Holder(step, size) for name in _NAMES}
    with Checkpointer(folder, keep_last=2, disk=disk) as checkpointer:
        checkpointer.save(step=step, note=f"step {step}", **things)


def wrong_with(folder: Path, steps: set[int], path: Path | None = None) -> str:
    """Load the newest checkpoint, or another; say what is wrong unless it is of one of `steps`."""
    things = {name: Holder() for name in _NAMES}
    state = Checkpointer(folder).load(path, **things)
    if state.step not in steps:
        return f"step {state.step} was loaded, not one of {steps}"
    if state.values["note"] != f"step {state.step}":
        return f"step {state.step} has the values of {state.values['note']}"
    mixed = [name for name, thing in things.items() if not thing.is_of(state.step)]
    return f"{mixed} of step {state.step} are of another" if mixed else ""
