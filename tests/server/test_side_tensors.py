"""Steps of a Trunk that needs more than the hidden states, checked as strictly as those are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving_fakes import FakePart

from splitlearn_core import HiddenState
from splitlearn_core.side_values import CrossingValue, Size
from splitlearn_manager.server.model_metadata import describe
from splitlearn_manager.serving.errors import BadStepError, UnsupportedComponentError
from splitlearn_manager.serving.forward import Outcome, Work, run_piece
from splitlearn_manager.serving.step import Contract, Part, State, Step, check_step
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, decode, encode


def run_step(part: Part, session: State, step: Step) -> Outcome:
    """Run a step as a whole."""
    outcome = run_piece(part, Work(session, step, session.cache), step.new)
    assert outcome is not None
    return outcome


IDS = CrossingValue("input_ids", "int64", (), "the tokens themselves", below=11)
ROWS = CrossingValue("rows", "float32", (Size(2), Size(3)), "", layerwise=True)
INDICES = CrossingValue("indices", "int32", (Size(5, exact=False),), "")


class SidePart(FakePart):
    """Takes ids, rows and indices with its hidden states, and gives indices back."""

    side_inputs = (IDS, ROWS, INDICES)
    side_outputs = (INDICES,)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        self.given = inputs
        left = super().__call__(inputs.tensor, **kwargs)
        return HiddenState(left, {**inputs.side, "indices": inputs.side["indices"] + 1})


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Return what a step of two new positions holds."""
    return {
        "HIDDEN_STATES": torch.ones(1, 2, 4),
        "SIDE_1": torch.tensor([[3, 10]]),
        "SIDE_2": torch.ones(1, 2, 2, 3),
        "SIDE_3": torch.zeros(1, 2, 4, dtype=torch.int32),
        **changes,
    }


def frame(**changes: torch.Tensor | None) -> Frame:
    held = {k: v for k, v in tensors(**changes).items() if v is not None}
    wired = tuple(tensor_to_wire(TensorName[name], value) for name, value in held.items())
    return decode(encode(Frame(Kind.STEP, 1, 2, 0, tensors=wired)))


def state(part: Any) -> State:
    return State(Contract.of(part), part.new_cache(), 16)


def test_a_part_gets_what_came_with_the_hidden_states_and_gives_back_what_it_made() -> None:
    part = SidePart()
    session = state(part)

    outcome = run_step(part, session, check_step(session, frame()))

    assert torch.equal(part.given.side["input_ids"], torch.tensor([[3, 10]]))
    assert part.given.side["rows"].shape == (1, 2, 2, 3)
    reply = decode(outcome.reply)
    assert [tensor.name for tensor in reply.tensors] == [
        TensorName.HIDDEN_STATES,
        TensorName.SIDE_1,
    ]
    assert torch.equal(tensor_from_wire(reply.tensors[1]), torch.ones(1, 2, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SIDE_1": None}, "has no input_ids"),
        ({"SIDE_1": torch.zeros(1, 2)}, "input_ids must be INT64 .batch, new., found FP32"),
        ({"SIDE_1": torch.tensor([[1]])}, r"input_ids must be INT64 .*found INT64 \[1, 1\]"),
        ({"SIDE_1": torch.ones(2, 2).long()}, r"found INT64 \[2, 2\]"),
        ({"SIDE_2": torch.ones(1, 2, 3, 3)}, r"rows must be FP32 \[batch, new, 2, 3\]"),
        ({"SIDE_2": torch.ones(1, 2, 6)}, r"rows must be .*found FP32 \[1, 2, 6\]"),
        ({"SIDE_3": torch.zeros(1, 2, 6, dtype=torch.int32)}, "indices must be .*up to 5"),
        ({"SIDE_4": torch.zeros(1, 2)}, "SIDE_4 is no input of this model"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(BadStepError, match=message):
        check_step(state(SidePart()), frame(**changes))


@pytest.mark.parametrize("token", [-1, 11])
def test_ids_that_the_model_has_not_are_refused_before_anything_runs(token: int) -> None:
    part = SidePart()
    session = state(part)
    step = check_step(session, frame(SIDE_1=torch.tensor([[3, token]])))

    with pytest.raises(BadStepError, match="input_ids must be 0 to 10"):
        run_step(part, session, step)

    assert part.calls == []


def test_a_part_that_needs_nothing_is_sent_nothing() -> None:
    with pytest.raises(BadStepError, match="SIDE_1 is no input"):
        check_step(state(FakePart()), frame(SIDE_2=None, SIDE_3=None))


def test_a_part_that_does_not_give_what_it_says_is_at_fault() -> None:
    part = SidePart()
    part.side_outputs = (ROWS, IDS, INDICES, CrossingValue("more", "float32", (), ""))
    session = state(part)

    with pytest.raises(KeyError, match="more"):
        run_step(part, session, check_step(session, frame()))


def test_more_values_than_have_names_are_refused_when_a_session_opens() -> None:
    part = SidePart()
    part.side_inputs = (IDS,) * 9

    with pytest.raises(UnsupportedComponentError, match="9 values go with"):
        Contract.of(part)


def test_metadata_names_them_in_the_order_of_their_codes() -> None:
    described = describe("trunk", SidePart())

    assert described["inputs"][1:4] == [
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "rows", "datatype": "FP32", "shape": [-1, -1, 2, 3]},
        {"name": "indices", "datatype": "INT32", "shape": [-1, -1, -1]},
    ]
    assert [entry["name"] for entry in described["outputs"]] == ["hidden_states", "indices"]
    assert described["properties"]["layerwise"] == "rows"
