"""Bringing a new session to where another one was, and making sure that it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from splitlearn_manager.client.connection import RemoteSession, Request
from splitlearn_manager.client.errors import RemoteError
from splitlearn_manager.client.history import History, SentRows, SentStep
from splitlearn_manager.serving.tensors import tensor_from_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, decode

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from splitlearn_manager.client.description import Description
    from splitlearn_manager.client.replicas import Replica

    Asking = Generator[Request, Frame | None, None]

Key = TypeVar("Key")

TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
"""How far a step's result may be from what it was, by the dtype of the hidden states, relative to
the largest number of it.  Another machine, number of threads or company in a forward changes the
order of sums; another model changes everything."""

INT8_TOLERANCE = 0.3
"""The same for layers packed as int8: a processor without VNNI rounds activations to 7 bits."""


def tolerance_of(description: Description) -> float:
    """Return how far results of a Trunk may be apart, relative to the largest number."""
    dtype = description.hidden_dtype
    if description.quantization == "int8":
        return INT8_TOLERANCE
    if description.quantization == "fp16":
        return max(TOLERANCES[torch.float16], TOLERANCES[dtype])
    return TOLERANCES[dtype]


def mark_of(result: torch.Tensor) -> torch.Tensor:
    """Return by what a step's result, [rows, new, hidden], is known again: its last position."""
    return result[:, -1:].clone()


def replay(session: RemoteSession, history: History[torch.Tensor], tolerance: float) -> Asking:
    """Yield what to ask of an empty session, one thing after the other, and take the answers.

    Raises:
        RemoteError: A result is not what it was; code `another_model`.
    """
    for entry, mark in history:
        if isinstance(entry, SentRows):
            yield Request(Frame(Kind.REORDER, info={"rows": list(entry.rows)}), Kind.DONE, session)
        else:
            yield from _replay_step(session, entry, mark, tolerance)


def _replay_step(
    session: RemoteSession, step: SentStep, mark: torch.Tensor | None, tolerance: float
) -> Asking:
    """Send a step again as it was, and roll back what was rolled back of it."""
    answer = yield Request(decode(step.message), Kind.RESULT, session)
    if mark is not None and answer is not None:
        _check(answer, mark, tolerance, session)
    if step.kept < step.new:
        end = Frame(Kind.ROLL_BACK, position=step.begin + step.kept)
        yield Request(end, Kind.DONE, session)


def _check(answer: Frame, mark: torch.Tensor, tolerance: float, session: RemoteSession) -> None:
    """Make sure that a result is what it was.

    Raises:
        RemoteError: It is not; says by how much.
    """
    where = session.connection.address
    wire = answer.tensor(TensorName.HIDDEN_STATES)
    found = None if wire is None else mark_of(tensor_from_wire(wire))
    if found is None or found.shape != mark.shape or found.dtype != mark.dtype:
        raise RemoteError(f"{where} answered a step in another form than before", "another_model")
    off = _difference(mark, found)
    if not off <= tolerance:
        raise RemoteError(
            f"{where} has another model: a step that was sent again gave results that are off by"
            f" {off:.2g} of the largest number, and {tolerance:g} is what the dtype explains",
            "another_model",
        )


def _difference(known: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    one, other = known.to(torch.float64), found.to(torch.float64)
    largest = max(float(one.abs().max()), torch.finfo(known.dtype).tiny)
    return float((one - other).abs().max()) / largest


def replay_all(replica: Replica, work: Mapping[Key, Asking]) -> dict[Key, Exception]:
    """Bring several sessions to where they were, side by side, so that they share forwards.

    Returns:
        What went wrong with each that could not be.
    """
    failed: dict[Key, Exception] = {}
    waiting = {key: Request(Frame(Kind.STEP), Kind.RESULT) for key in work}  # answered with nothing
    while waiting:
        answered, waiting = waiting, {}
        for key, request in answered.items():
            if isinstance(request.answer, Exception):
                failed[key] = request.answer
                continue
            try:
                waiting[key] = work[key].send(request.answer)
            except StopIteration:
                pass
            except RemoteError as error:
                failed[key] = error
        replica.exchange(list(waiting.values()))
    return failed
