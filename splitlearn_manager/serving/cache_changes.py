"""What is done to a session's cache besides forwards; in the model's thread, as these are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.cache import GhostLayer
from splitlearn_manager.serving.errors import BadStepError, RollBackError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_manager.serving.step import State


def record_past(cache: Any) -> None:
    """Let a cache keep, from step to step, what taking that step back needs.

    Raises:
        RollBackError: It can't take steps back: it has states that have no earlier ones.
    """
    if not getattr(cache, "is_croppable", False):
        raise RollBackError(
            "sessions of this model can't roll back: its layers keep states, not positions"
        )
    cache.activate_past_recording()


def trim(cache: Any) -> None:
    """Forget what taking the last step back would have needed: it stands."""
    cache.crop(0)


def roll_back(state: State, length: int) -> torch.Tensor | None:
    """Forget the positions from `length` on; return the mask of those that are left.

    Raises:
        RollBackError: A layer no longer has what came before them; nothing was changed.
    """
    if not 0 <= length <= state.length:
        raise RollBackError(f"the session holds {state.length} positions, {length} can't be left")
    removed = state.length - length
    for layer in getattr(state.cache, "layers", ()):
        _check_layer(layer, removed)
    if removed:
        state.cache.crop(-removed)
    return None if state.mask is None else state.mask[:, :length]


def reorder(state: State, rows: Sequence[int]) -> torch.Tensor | None:
    """Let the rows of a cache be those that are named; return their mask.

    Raises:
        BadStepError: There is no such row; nothing was changed.
    """
    known = range(state.batch or 0)
    if unknown := sorted(set(rows) - set(known)):
        raise BadStepError(f"the session has rows 0 to {len(known) - 1}, found {unknown[0]}")
    index = torch.tensor(rows)
    state.cache.reorder_cache(index)
    return None if state.mask is None else state.mask[index]


def _check_layer(layer: Any, removed: int) -> None:
    """Refuse to take back what a layer has lost."""
    if isinstance(layer, GhostLayer):
        return
    if hasattr(layer, "conv_states"):
        raise RollBackError("the model's layers keep states, which can't be taken back")
    window = getattr(layer, "sliding_window", None)
    if window is None or not layer.is_initialized:
        return
    left = layer.cumulative_length - removed
    if layer.keys.shape[-2] - removed < min(left, window - 1):
        raise RollBackError(
            f"{removed} positions can't be taken back: a layer sees {window} and has forgotten"
            " those before; open the session with rollback, and take back the last step alone"
        )
