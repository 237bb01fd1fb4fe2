"""The forwards of steps: from the bytes of their frames to those of the answers.

Everything here runs in the thread of a model.  A step runs alone, in one piece or in several, or
together with those of other sessions: packed into one row, pieces of any lengths, where the part
can; else as one batch of equally long steps.  Caches are filled in place; the rest of a session's
`State` is only read: it belongs to the event loop.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import JoinedCache
from splitlearn_core.packed_cache import PackedCache
from splitlearn_core.session_attention import attends_in_place
from splitlearn_manager.serving.cache_changes import trim
from splitlearn_manager.serving.errors import BadStepError, NotFiniteError, StepFailedError
from splitlearn_manager.serving.finite import not_finite
from splitlearn_manager.serving.step import Contract, Part, SideTensor, State, Step, shown
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, WireTensor, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)

_MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step came to: the encoded RESULT, and the mask of all positions."""

    reply: bytes
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step brings, as tensors.

    Attributes:
        given: Hidden states [batch, new, *hidden_shape], with what goes with them.
        positions: int64 [batch, new], where the client said them.
        mask: uint8 [batch, length + new], where a step of the session had one.
    """

    given: HiddenState
    positions: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(eq=False, slots=True)
class Work:
    """A step on its way.

    Attributes:
        state: The session's.
        step: What is to be done.
        cache: The session's, which may end, and let go of it, while its step is under way.
        inputs: Its tensors, once it has begun.
        pieces: What the part gave for the positions that are done.
        since: When it came, or its last piece ended, on the clock of `time.perf_counter`.
        waited: Seconds in which it waited for its turns.
        ran: Seconds that its forwards took, with those who shared them.
        dropped: Whether nobody waits for it any more; set by the event loop.
    """

    state: State
    step: Step
    cache: Any
    inputs: Inputs | None = None
    pieces: list[HiddenState] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    ran: float = 0.0
    dropped: bool = False

    def begin(self) -> Inputs:
        """Return the step's tensors.

        Raises:
            BadStepError: Its position ids, or other ids, are not of this model.
        """
        if self.inputs is None:
            self.inputs = read_inputs(self.state, self.step)
            if self.state.records and self.state.length:
                trim(self.cache)
        return self.inputs

    def turn_began(self, now: float) -> None:
        """Note that it waits no longer."""
        self.waited += now - self.since
        self.since = now

    def turn_ended(self, now: float) -> None:
        """Note that its forward has ended, which began with its turn."""
        self.ran += now - self.since
        self.since = now

    @property
    def done(self) -> int:
        """Positions that are done."""
        return sum(piece.shape[1] for piece in self.pieces)

    @property
    def timings(self) -> dict[str, int]:
        """How long it waited and ran, in microseconds, where its client wants to know."""
        if not self.state.timings:
            return {}
        return {"queue_us": round(self.waited * _MICRO), "forward_us": round(self.ran * _MICRO)}


def run_piece(part: Part, work: Work, most: int) -> Outcome | None:
    """Run at most so many of a step's positions; return the outcome if none is left.

    Raises:
        BadStepError: The position ids, or other ids, are not of this model, or a number is not
            finite; nothing has run.
        NotFiniteError: What the part gave is not; the cache holds what made it so.
    """
    _check_wanted(work)
    work.turn_began(time.perf_counter())
    inputs = work.begin()
    start = work.done
    stop = min(start + most, work.step.new)
    mask = None if inputs.mask is None else inputs.mask[:, : work.state.length + stop].long()
    positions = inputs.positions
    output = _call(
        part,
        inputs.given.between(start, stop),
        mask,
        None if positions is None else positions[:, start:stop],
        work.cache,
    )
    given = HiddenState.of(output)
    _check_given(given, work.state.length + start)
    work.turn_ended(time.perf_counter())
    work.pieces.append(given)
    return _answer(work) if stop == work.step.new else None


def run_packed(part: Part, pieces: Sequence[tuple[Work, int]]) -> list[Outcome | Exception | None]:
    """Run pieces of steps of several sessions, each of any length, packed into one row.

    One that can't be run fails alone: if the forward fails, each is run by itself.

    Args:
        part: Whose sessions they are.
        pieces: Steps without masks, and at most how many of their positions to run.

    Returns:
        For each its outcome; `None` where some of its positions are left.
    """
    outcomes: dict[Work, Outcome | Exception | None] = {}
    most = dict(pieces)
    ready = [(work, min(most[work], work.step.new - work.done)) for work in _begun(most, outcomes)]
    if len(ready) > 1:
        ready = _run_packed(part, ready, outcomes)
    for work, new in ready:
        outcomes[work] = _run_alone(part, work, new)
    return [outcomes[work] for work, _ in pieces]


def run_together(
    part: Part, works: Sequence[Work], *, masked: bool = True
) -> list[Outcome | Exception]:
    """Run steps of several sessions, of equally many positions, as one batch.

    One that can't be run fails alone: if the batch fails, each is run by itself.

    Args:
        part: Whose sessions they are.
        works: The steps.
        masked: Whether the part takes a mask (`splitlearn_core.joined_cache.Joinable`).
    """
    outcomes: dict[Work, Outcome | Exception | None] = {}
    ready = _begun(works, outcomes)
    ready = _run_graphed(part, ready, outcomes)
    if len(ready) > 1:
        ready = _run_joined(part, ready, outcomes, masked=masked)
    for work in ready:
        outcomes[work] = _run_alone(part, work, work.step.new)
    return [outcomes[work] or _not_done() for work in works]


def _begun(works: Iterable[Work], outcomes: dict[Work, Outcome | Exception | None]) -> list[Work]:
    """Read what steps bring; return those that can be run, and say of the others why not."""
    ready: list[Work] = []
    for work in works:
        try:
            _check_wanted(work)
            work.begin()
        except Exception as error:  # noqa: BLE001 - it is the answer to this step alone
            outcomes[work] = error
        else:
            ready.append(work)
    return ready


def _check_wanted(work: Work) -> None:
    """Run nothing for nobody."""
    if work.dropped:
        raise StepFailedError("whoever sent the step is gone")


def _run_graphed(
    part: Part, works: list[Work], outcomes: dict[Work, Outcome | Exception | None]
) -> list[Work]:
    """Run those steps as a CUDA graph that can be, where there are graphs; return the others.

    If that fails, all are others.  (Once a graph could not be recorded, none can be.)
    """
    graphs = getattr(part, "step_graphs", None)
    if graphs is None:
        return works
    chosen = [work for work in works if _is_plain(work) and graphs.takes(work.cache)]
    if not chosen:
        return works
    started = time.perf_counter()
    for work in chosen:
        work.turn_began(started)
    try:
        output = graphs.step(
            [work.cache for work in chosen],
            torch.cat([work.begin().given.tensor for work in chosen]),
            torch.cat([_position_of(work) for work in chosen]),
        )
    except Exception:
        logger.exception("a step of %s as a CUDA graph failed, and is run as it is", part.component)
        return works
    bad = not_finite(output) is not None  # waits for the GPU
    ended = time.perf_counter()
    for number, work in enumerate(chosen):
        work.turn_ended(ended)
        work.pieces.append(HiddenState(output[number : number + 1]))
        outcomes[work] = _finished_finite(work) if bad else _finished(work)
    return [work for work in works if work not in chosen]


def _is_plain(work: Work) -> bool:
    """Whether a step is one position of one row, without a mask."""
    step = work.step
    return (step.batch, step.new) == (1, 1) and work.begin().mask is None


def _position_of(work: Work) -> torch.Tensor:
    """Return the position id of a step of one position, int64 [1, 1]."""
    said = work.begin().positions
    return torch.tensor([[work.state.length]]) if said is None else said


def _finished_finite(work: Work) -> Outcome | Exception:
    """Return what a step came to, or that what the part gave is no number."""
    try:
        _check_given(work.pieces[-1], work.state.length)
    except Exception as error:  # noqa: BLE001 - it is the answer to this step alone
        return error
    return _finished(work)


def _run_joined(
    part: Part,
    works: list[Work],
    outcomes: dict[Work, Outcome | Exception | None],
    *,
    masked: bool,
) -> list[Work]:
    """Run steps as one batch; return those that are to be run alone, because that failed."""
    joined: JoinedCache | None = None
    started = time.perf_counter()
    for work in works:
        work.turn_began(started)
    try:
        with torch.inference_mode():
            in_place = attends_in_place(part)
            joined = JoinedCache([work.cache for work in works], in_place=in_place)
            output = _call_joined(part, works, joined, masked=masked)
            _check_given(output, works[0].state.length)
            joined.commit()
    except Exception:  # noqa: BLE001 - whose fault it is shows when each is run alone
        if joined is not None:
            joined.roll_back()
        return works
    ended = time.perf_counter()
    for number, work in enumerate(works):
        work.turn_ended(ended)
        work.pieces.append(output.rows(joined.rows_of(number)))
        outcomes[work] = _finished(work)
    return []


def _call_joined(
    part: Part, works: list[Work], joined: JoinedCache, *, masked: bool
) -> HiddenState:
    """Run the part on the rows of all steps."""
    inputs = [work.begin() for work in works]
    new = works[0].step.new
    counted = joined.position_ids(new)
    for number, one in enumerate(inputs):
        if one.positions is not None:
            counted[joined.rows_of(number)] = one.positions
    mask = joined.mask(new, [one.mask for one in inputs]) if masked else None
    given = HiddenState.joined([one.given for one in inputs], dim=0)
    return HiddenState.of(_call(part, given, mask, counted, joined))


def _run_packed(
    part: Part,
    pieces: Sequence[tuple[Work, int]],
    outcomes: dict[Work, Outcome | Exception | None],
) -> list[tuple[Work, int]]:
    """Run pieces in one row; return those that are to be run alone, because that failed."""
    packed: PackedCache | None = None
    started = time.perf_counter()
    for work, _ in pieces:
        work.turn_began(started)
    try:
        with torch.inference_mode():
            sizes = [(work.step.batch, new) for work, new in pieces]
            packed = PackedCache([work.cache for work, _ in pieces], sizes)
            output = _call_packed(part, pieces, packed)
            _check_given(output, 0)
            packed.commit()
    except Exception:  # noqa: BLE001 - whose fault it is shows when each is run alone
        if packed is not None:
            packed.roll_back()
        return list(pieces)
    ended = time.perf_counter()
    for (work, _), given in zip(pieces, packed.unpack(output), strict=True):
        work.turn_ended(ended)
        work.pieces.append(given)
        outcomes[work] = _finished(work) if work.done == work.step.new else None
    return []


def _call_packed(
    part: Part, pieces: Sequence[tuple[Work, int]], packed: PackedCache
) -> HiddenState:
    """Run the part on the positions of all pieces."""
    given: list[HiddenState] = []
    positions = packed.position_ids()
    start = 0
    for work, new in pieces:
        inputs, done, stop = work.begin(), work.done, start + work.step.batch * new
        given.append(inputs.given.between(done, done + new))
        if inputs.positions is not None:
            positions[:, start:stop] = inputs.positions[:, done : done + new].reshape(1, -1)
        start = stop
    return HiddenState.of(_call(part, packed.pack(given), packed.mask, positions, packed))


def _run_alone(part: Part, work: Work, most: int) -> Outcome | Exception | None:
    """Run a step, or a piece of it; return what it came to, an error included."""
    try:
        return run_piece(part, work, most)
    except Exception as error:  # noqa: BLE001 - it is the answer to this step alone
        return error


def _finished(work: Work) -> Outcome | Exception:
    """Return what a step came to that was done beside others: an error is its own."""
    try:
        return _answer(work)
    except Exception as error:  # noqa: BLE001 - it is the answer to this step alone
        return error


def _not_done() -> RuntimeError:
    return RuntimeError("a step that was run as a whole is not done")


def _call(
    part: Part,
    given: HiddenState,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    cache: object,
) -> torch.Tensor | HiddenState:
    """Run the part, without gradients."""
    with torch.inference_mode():
        return part(
            given.handed_on,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )


# --- From and to frames --------------------------------------------------------------------


def read_inputs(state: State, step: Step) -> Inputs:
    """Return the tensors of a step.

    Raises:
        BadStepError: The position ids, or other ids, are not of this model, or a number is not
            finite.
    """
    positions = None if step.positions is None else _position_ids(step.positions, state)
    return Inputs(_given(state, step), positions, _whole_mask(state, step))


def _answer(work: Work) -> Outcome:
    """Return the RESULT of a step that is done."""
    step, contract = work.step, work.state.contract
    left = HiddenState.joined(work.pieces, dim=1)
    result = tensor_to_wire(TensorName.HIDDEN_STATES, left.tensor)
    if (result.dtype, result.shape) != (step.hidden.dtype, step.hidden.shape):
        raise RuntimeError(f"the part gave {shown(result)} for {shown(step.hidden)}")
    end = work.state.length + step.new
    beside = _beside(contract, left, result)
    tensors = (result, *beside)
    reply = Frame(Kind.RESULT, step.request, step.session, end, tensors, work.timings)
    return Outcome(encode(reply), work.begin().mask)


def _given(state: State, step: Step) -> HiddenState:
    """Return the hidden states, with what came with them."""
    side = {
        wanted.name: _in_range(wanted, tensor_from_wire(tensor))
        for wanted, tensor in zip(state.contract.takes, step.side, strict=True)
    }
    given = HiddenState(tensor_from_wire(step.hidden), side)
    for name, tensor in (("hidden_states", given.tensor), *side.items()):
        if found := not_finite(tensor):
            row, position = found
            raise BadStepError(
                f"{name} has NaN or an infinity at row {row}, position {state.length + position}"
                f" ({position} of the step); every number must be finite"
            )
    return given


def _check_given(output: HiddenState, length: int) -> None:
    """Refuse to go on with numbers that are none, which a cache would keep.

    Raises:
        NotFiniteError: The part gave such.
    """
    if found := not_finite(output.tensor):
        row, position = found
        raise NotFiniteError(
            f"the part itself gave NaN or an infinity at row {row}, position {length + position},"
            " and the session with it ends: the numbers sent are too large for it, or its dtype"
            " is too narrow (float16 overflows where bfloat16 does not)"
        )


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
