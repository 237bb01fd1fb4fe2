"""The forward of a step: from the bytes of its frame to those of the answer, in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager.serving.errors import BadStepError
from splitlearn_manager.serving.step import Contract, Part, SideTensor, State, Step, shown
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, WireTensor, encode


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step came to: the encoded RESULT, and the mask of all positions."""

    reply: bytes
    mask: torch.Tensor | None


def run_step(part: Part, state: State, step: Step) -> Outcome:
    """Run a step and encode its answer; in the model's thread.

    The cache is filled in place.  The rest of `state` is only read: it belongs to the event loop.

    Raises:
        BadStepError: The position ids, or other ids, are not of this model; nothing has run.
    """
    positions = None if step.positions is None else _position_ids(step.positions, state)
    mask = _whole_mask(state, step)
    given = _given(state.contract, step)
    with torch.inference_mode():
        output = part(
            given,
            attention_mask=None if mask is None else mask.to(torch.int64),
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        )
    left = HiddenState.of(output)
    result = tensor_to_wire(TensorName.HIDDEN_STATES, left.tensor)
    if (result.dtype, result.shape) != (step.hidden.dtype, step.hidden.shape):
        raise RuntimeError(f"the part gave {shown(result)} for {shown(step.hidden)}")
    end = state.length + step.new
    beside = _beside(state.contract, left, result)
    reply = Frame(Kind.RESULT, step.request, step.session, end, tensors=(result, *beside))
    return Outcome(encode(reply), mask)


def _given(contract: Contract, step: Step) -> torch.Tensor | HiddenState:
    """Return the hidden states, with what came with them."""
    side = {
        wanted.name: _in_range(wanted, tensor_from_wire(tensor))
        for wanted, tensor in zip(contract.takes, step.side, strict=True)
    }
    return HiddenState(tensor_from_wire(step.hidden), side).handed_on


def _in_range(wanted: SideTensor, values: torch.Tensor) -> torch.Tensor:
    """Return whole numbers, of which a model may look up each in a table."""
    if wanted.below is not None:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= wanted.below:
            raise BadStepError(
                f"{wanted.name} must be 0 to {wanted.below - 1}, found {low} to {high}"
            )
    return values


def _beside(contract: Contract, left: HiddenState, hidden: WireTensor) -> tuple[WireTensor, ...]:
    """Return what goes back with the hidden states."""
    tensors = tuple(
        tensor_to_wire(wanted.code, left.side[wanted.name]) for wanted in contract.gives
    )
    for wanted, tensor in zip(contract.gives, tensors, strict=True):
        if not wanted.fits(tensor, hidden):
            raise RuntimeError(f"{wanted}, the part gave {shown(tensor)}")
    return tensors


def _position_ids(wire: WireTensor, state: State) -> torch.Tensor:
    """Return position ids, of which a model may look up each in a table of its positions."""
    ids = tensor_from_wire(wire)
    low, high = int(ids.min()), int(ids.max())
    limit = state.contract.max_positions
    if low < 0 or (limit is not None and high >= limit):
        allowed = "0 or more" if limit is None else f"0 to {limit - 1}"
        raise BadStepError(f"position_ids must be {allowed}, found {low} to {high}")
    return ids


def _whole_mask(state: State, step: Step) -> torch.Tensor | None:
    """Return the mask of all positions; columns for which none was sent are all ones."""
    if state.mask is None and step.mask is None:
        return None
    before = state.mask
    if before is None:
        before = torch.ones(step.batch, state.length, dtype=torch.uint8)
    if step.mask is None:
        new = torch.ones(step.batch, step.new, dtype=torch.uint8)
    else:
        new = tensor_from_wire(step.mask).ne(0).to(torch.uint8)
    return torch.cat([before, new], dim=1)
