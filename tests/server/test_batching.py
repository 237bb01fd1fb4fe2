"""Sessions that share forwards: who is in which, and that each gets what is its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from joining import alone, load_ends
from serving_fakes import OnePart, Owner, hidden, trunk_config

from splitlearn_core import SplitModel
from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving import batcher, batchers, pace
from splitlearn_manager.serving.batcher import BatchLimits
from splitlearn_manager.serving.errors import BadStepError, NotFiniteError, StepFailedError
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import CloseReason, Frame, Kind, TensorName, decode

pytestmark = pytest.mark.anyio

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def trunk() -> SplitModel:
    return load_ends("llama")[1]


class Forwards(Metrics):
    """Notes the rows of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.ran = asyncio.Event()

    def forward(self, model_id: str, rows: int, seconds: float) -> None:
        super().forward(model_id, rows, seconds)
        self.rows.append(rows)
        self.ran.set()


@dataclass
class Bench:
    """Sessions of one model, whose thread a test can hold."""

    manager: AsyncModelManager
    loader: OnePart
    table: SessionTable
    forwards: Forwards
    given: dict[Session, list[HiddenState]] = field(default_factory=dict)
    said: dict[Session, Mapping[str, Any]] = field(default_factory=dict)

    async def open(self, **wishes: Any) -> Session:
        return await self.table.open(Owner(), "trunk", **wishes)

    def start(
        self,
        session: Session,
        hidden: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> asyncio.Task[torch.Tensor]:
        """Send a step."""
        return asyncio.create_task(self._step(session, hidden, positions, mask))

    async def _step(
        self,
        session: Session,
        hidden: torch.Tensor,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        tensors = [tensor_to_wire(TensorName.HIDDEN_STATES, hidden)]
        if positions is not None:
            tensors.append(tensor_to_wire(TensorName.POSITION_IDS, positions))
        if mask is not None:
            tensors.append(tensor_to_wire(TensorName.ATTENTION_MASK, mask.to(torch.uint8)))
        frame = Frame(Kind.STEP, 1, session.id, session.state.length, tensors=tuple(tensors))
        self.table.claim(session.owner, session.id)
        self.given.setdefault(session, []).append(HiddenState(hidden))
        try:
            reply = decode(await self.table.step(session, frame))
        finally:
            self.table.release(session)
        self.said[session] = reply.info
        wire = reply.tensor(TensorName.HIDDEN_STATES)
        assert wire is not None
        return tensor_from_wire(wire)

    async def hold(self, model_id: str = "trunk") -> threading.Event:
        """Hold a model's thread until the event is set."""
        managed = await self.manager.get_model(model_id)
        assert managed is not None
        gate, held = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            loop.call_soon_threadsafe(held.set)
            assert gate.wait(30), "the test never let go of the thread"

        self._holding = asyncio.create_task(managed.run(wait))
        await held.wait()
        return gate

    def expected(self, trunk: SplitModel, session: Session) -> list[torch.Tensor]:
        with torch.inference_mode():
            return alone(trunk, self.given[session])


@pytest.fixture(autouse=True, params=["packed", "joined"])
def sharing(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How sessions share forwards; parts of some architectures can only be joined."""
    found: str = request.param
    changes = {"packed": {}, "joined": {"packed": False}}[found]
    real = batchers._joinable
    monkeypatch.setattr(batchers, "_joinable", lambda m: real(m)._replace(**changes))
    return found


@pytest.fixture(params=[BatchLimits(rows=8, piece=16)])
async def bench(request: Any, trunk: SplitModel) -> AsyncIterator[Bench]:
    loader = OnePart(trunk)
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=loader, single_threaded=False
    )
    forwards = Forwards()
    async with manager:
        await manager.load_model(trunk_config("trunk"))
        table = SessionTable(
            manager, max_sessions=8, idle_timeout=60, metrics=forwards, limits=request.param
        )
        async with table:
            yield Bench(manager, loader, table, forwards)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() / wanted.abs().max() <= TOLERANCE)


async def prompts(bench: Bench, lengths: list[int]) -> list[Session]:
    """Open a session for each length, and give it so many positions, one after the other."""
    sessions = [await bench.open() for _ in lengths]
    for number, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
        await bench.start(session, hidden(length, seed=number))
    bench.forwards.rows.clear()
    return sessions


async def test_steps_that_wait_are_one_forward(bench: Bench, trunk: SplitModel) -> None:
    sessions = await prompts(bench, [3, 9, 5])
    for number in range(3):
        gate = await bench.hold()
        steps = [bench.start(s, hidden(1, seed=10 * number + n)) for n, s in enumerate(sessions)]
        await _queued(bench, steps)
        gate.set()
        found = await asyncio.gather(*steps)
        for session, output in zip(sessions, found, strict=True):
            assert close(output, bench.expected(trunk, session)[-1])

    assert bench.forwards.rows == [3, 3, 3]


async def test_the_first_steps_after_prompts_that_ended_together_are_one_forward(
    bench: Bench, trunk: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "WAITING_SHARE", 1e9)
    monkeypatch.setattr(pace, "LONGEST_WAIT", 30.0)
    sessions = [await bench.open() for _ in range(2)]
    gate = await bench.hold()
    asked = [bench.start(s, hidden(5, seed=n)) for n, s in enumerate(sessions)]
    await _queued(bench, asked)
    gate.set()
    await asyncio.gather(*asked)
    bench.forwards.rows.clear()

    first = bench.start(sessions[0], hidden(1, seed=7))
    await _queued(bench, [first])
    second = bench.start(sessions[1], hidden(1, seed=8))
    found = await asyncio.gather(first, second)

    assert bench.forwards.rows == [2]
    for session, output in zip(sessions, found, strict=True):
        assert close(output, bench.expected(trunk, session)[-1])


async def test_nobody_waits_for_those_who_never_step_with_others(
    bench: Bench, trunk: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that closes after its prompt, and one whose steps have masks without ids."""
    monkeypatch.setattr(pace, "WAITING_SHARE", 1e9)
    monkeypatch.setattr(pace, "LONGEST_WAIT", 600.0)
    gone, padded, stepping = [await bench.open() for _ in range(3)]
    await bench.start(gone, hidden(5))
    await bench.start(stepping, hidden(5))
    bench.table.close(gone, CloseReason.CLOSED)
    mask = torch.ones(1, 4, dtype=torch.int64)
    await bench.start(padded, hidden(4), mask=mask)
    await bench.start(padded, hidden(1), mask=mask[:, :1])

    async with asyncio.timeout(30):
        output = await bench.start(stepping, hidden(1, seed=8))
    assert close(output, bench.expected(trunk, stepping)[-1])


@pytest.mark.parametrize("bench", [BatchLimits(rows=1)], indirect=True)
async def test_without_batching_each_step_is_equal_to_the_bit(
    bench: Bench, trunk: SplitModel
) -> None:
    sessions = await prompts(bench, [3, 9, 5])
    gate = await bench.hold()
    steps = [bench.start(s, hidden(1, seed=n)) for n, s in enumerate(sessions)]
    await _queued(bench, steps)
    gate.set()

    for session, output in zip(sessions, await asyncio.gather(*steps), strict=True):
        assert torch.equal(output, bench.expected(trunk, session)[-1])
    assert bench.forwards.rows == [1, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
async def test_a_step_with_what_is_no_number_fails_alone_and_can_be_sent_again(
    bench: Bench, trunk: SplitModel, bad: float
) -> None:
    sessions = await prompts(bench, [3, 9, 5])
    gate = await bench.hold()
    sent = [hidden(1, seed=n) for n in range(3)]
    spoilt = sent[1].clone()
    spoilt[0, 0, 63] = bad
    steps = [bench.start(s, h) for s, h in zip(sessions, [sent[0], spoilt, sent[2]], strict=True)]
    await _queued(bench, steps)
    gate.set()
    found = await asyncio.gather(*steps, return_exceptions=True)

    text = (
        r"hidden_states has NaN or an infinity at row 0, position 9 \(0 of the step\);"
        " every number must be finite"
    )
    with pytest.raises(BadStepError, match=text):
        await steps[1]
    bench.given[sessions[1]].pop()
    found[1] = await bench.start(sessions[1], sent[1])
    for session, output in zip(sessions, found, strict=True):
        assert isinstance(output, torch.Tensor)
        assert close(output, bench.expected(trunk, session)[-1])


async def test_the_first_bad_number_of_a_prompt_is_named(bench: Bench) -> None:
    session = await bench.open()
    spoilt = hidden(40, rows=3)
    spoilt[2, 30, 0] = spoilt[1, 31, 5] = float("nan")

    with pytest.raises(BadStepError, match="at row 1, position 31 "):
        await bench.start(session, spoilt)

    assert (session.state.length, session.state.reserved, session.state.positions) == (0, 0, 0)


async def test_numbers_that_the_part_spoils_end_their_session_alone(
    bench: Bench, trunk: SplitModel
) -> None:
    """A forward that gives what is no number is taken apart: who spoilt it shows alone."""
    sessions = await prompts(bench, [3, 9, 5])
    marked = hidden(1, seed=1)
    marked[0, 0, 0] = 77.0

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        del module
        given = HiddenState.of(args[0]).tensor
        bad = given[..., 0] == 77.0
        return output * torch.nan if bad.any() else output

    gate = await bench.hold()
    steps = [
        bench.start(s, marked if n == 1 else hidden(1, seed=n)) for n, s in enumerate(sessions)
    ]
    await _queued(bench, steps)
    with closing_hook(trunk.register_forward_hook(spoil)):
        gate.set()
        found = await asyncio.gather(*steps, return_exceptions=True)

    assert isinstance(found[1], NotFiniteError)
    assert "row 0, position 9" in str(found[1])
    assert sessions[1].owner.heard == [CloseReason.INTERNAL]  # type: ignore[attr-defined]
    for number in (0, 2):
        output = found[number]
        assert isinstance(output, torch.Tensor)
        assert close(output, bench.expected(trunk, sessions[number])[-1])
    assert len(bench.table) == 2


@contextmanager
def closing_hook(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


async def test_a_step_alone_is_equal_to_the_bit(bench: Bench, trunk: SplitModel) -> None:
    (session,) = await prompts(bench, [7])

    output = await bench.start(session, hidden(1))

    assert torch.equal(output, bench.expected(trunk, session)[-1])


async def test_steps_of_several_positions_share_too(
    bench: Bench, trunk: SplitModel, sharing: str
) -> None:
    """Clients that check several tokens at once; where they are joined, others wait."""
    sessions = await prompts(bench, [3, 9, 5, 4])
    gate = await bench.hold()
    sizes = [4, 1, 4, 1]
    steps = [bench.start(s, hidden(n, seed=n)) for n, s in zip(sizes, sessions, strict=True)]
    await _queued(bench, steps)
    gate.set()

    for session, output in zip(sessions, await asyncio.gather(*steps), strict=True):
        assert close(output, bench.expected(trunk, session)[-1])
    assert bench.forwards.rows == ([4] if sharing == "packed" else [2, 2])


@pytest.mark.parametrize("sharing", ["packed"], indirect=True)
async def test_prompts_and_steps_that_wait_are_one_forward(bench: Bench, trunk: SplitModel) -> None:
    (stepping,) = await prompts(bench, [7])
    await bench.start(stepping, hidden(1, seed=3))  # how long a step takes is known now
    newcomers = [await bench.open() for _ in range(3)]
    bench.forwards.rows.clear()
    gate = await bench.hold()
    steps = [bench.start(s, hidden(5, rows=2, seed=n)) for n, s in enumerate(newcomers)]
    steps.append(bench.start(stepping, hidden(1)))
    await _queued(bench, steps)
    gate.set()

    found = await asyncio.gather(*steps)
    for session, output in zip((*newcomers, stepping), found, strict=True):
        assert close(output, bench.expected(trunk, session)[-1])
    assert bench.forwards.rows[0] >= 3
    assert len(bench.forwards.rows) < 4


async def test_a_prompt_has_its_turn_beside_steps_that_it_can_not_share_with(
    bench: Bench, trunk: SplitModel
) -> None:
    """Steps of a session with padding are never packed."""
    padded, newcomer = await bench.open(), await bench.open()
    mask = torch.ones(2, 4, dtype=torch.int64)
    mask[0, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    await bench.start(padded, hidden(4, rows=2), positions, mask)
    gate = await bench.hold()
    prompt = bench.start(newcomer, hidden(40))
    await _queued(bench, [prompt])
    turns = 0
    while not prompt.done():
        turns += 1
        assert turns < 12
        step = bench.start(padded, hidden(1, rows=2), positions[:, -1:] + turns)
        await _queued(bench, [step])
        gate.set()
        await step

    assert close(await prompt, bench.expected(trunk, newcomer)[-1])


async def test_a_prompt_of_many_rows_alone_runs_in_whole_pieces(bench: Bench) -> None:
    session = await bench.open()
    await bench.start(session, hidden(40, rows=12))
    assert bench.forwards.rows == [12, 12, 12]


@pytest.mark.parametrize("sharing", ["packed"], indirect=True)
async def test_steps_do_not_wait_until_what_prompts_have_freed_is_back(
    bench: Bench, trunk: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(batcher, "_UNTIDY", 1)
    monkeypatch.setattr(batcher, "return_freed_memory", lambda: let_go.wait(30))
    stepping = await bench.open()
    let_go.set()
    await bench.start(stepping, hidden(3))
    await bench.start(stepping, hidden(1, seed=2))
    let_go.clear()
    newcomer = await bench.open()
    gate = await bench.hold()
    steps = [bench.start(newcomer, hidden(5)), bench.start(stepping, hidden(1))]
    await _queued(bench, steps)
    gate.set()

    assert close(await steps[1], bench.expected(trunk, stepping)[-1])
    assert not steps[0].done()
    let_go.set()
    assert close(await steps[0], bench.expected(trunk, newcomer)[-1])


@pytest.mark.parametrize("sharing", ["packed"], indirect=True)
async def test_who_goes_in_the_middle_of_a_packed_prompt_is_forgotten(
    bench: Bench, trunk: SplitModel
) -> None:
    goes, stays = await bench.open(), await bench.open()
    first = bench.start(goes, hidden(120))
    second = bench.start(stays, hidden(100, seed=1))
    await bench.forwards.ran.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first

    assert close(await second, bench.expected(trunk, stays)[-1])
    assert len(bench.table) == 1


@pytest.mark.parametrize("sharing", ["packed"], indirect=True)
async def test_before_it_is_known_how_long_steps_take_they_run_without_prompts(
    bench: Bench, trunk: SplitModel
) -> None:
    (stepping,) = await prompts(bench, [7])
    newcomer = await bench.open()
    gate = await bench.hold()
    steps = [bench.start(newcomer, hidden(5)), bench.start(stepping, hidden(1))]
    await _queued(bench, steps)
    gate.set()

    for session, output in zip((newcomer, stepping), await asyncio.gather(*steps), strict=True):
        assert close(output, bench.expected(trunk, session)[-1])
    assert bench.forwards.rows == [1, 1]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bench", [BatchLimits(rows=2, piece=16)], indirect=True)
async def test_a_prompt_has_its_turn_beside_as_many_steps_as_there_may_be(
    bench: Bench, trunk: SplitModel, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:  # what steps take: they fail, say
        monkeypatch.setattr(pace, "_MOST_MIXED", 0)
    sessions = await prompts(bench, [3, 4])
    await asyncio.gather(*(bench.start(s, hidden(1, seed=8)) for s in sessions))
    newcomer = await bench.open()
    gate = await bench.hold()
    prompt = bench.start(newcomer, hidden(40))
    await _queued(bench, [prompt])
    turns = 0
    while not prompt.done():
        steps = [bench.start(s, hidden(1, seed=turns)) for s in sessions]
        await _queued(bench, steps)
        gate.set()
        await asyncio.gather(*steps)
        turns += 1
        assert turns < 12

    assert close(await prompt, bench.expected(trunk, newcomer)[-1])


async def test_a_session_with_padding_shares_with_its_like(
    bench: Bench, trunk: SplitModel, sharing: str
) -> None:
    """A mask can't be packed: such steps are joined, and such prompts run alone."""
    padded, other = await bench.open(), await bench.open()
    mask = torch.ones(2, 4, dtype=torch.int64)
    mask[0, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for session in (padded, other):
        await bench.start(session, hidden(4, rows=2), positions, mask)
    plain = (await prompts(bench, [3, 5]))[:1]
    ends = positions[:, -1:] + 1
    gate = await bench.hold()
    steps = [bench.start(session, hidden(1, rows=2), ends) for session in (padded, other)]
    steps += [bench.start(session, hidden(1)) for session in plain]
    await _queued(bench, steps)
    gate.set()
    found = await asyncio.gather(*steps)

    cache = trunk.new_cache()
    with torch.inference_mode():
        trunk(hidden(4, rows=2), attention_mask=mask, position_ids=positions, past_key_values=cache)
        wanted = trunk(
            hidden(1, rows=2),
            attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1),
            position_ids=ends,
            past_key_values=cache,
        )
    assert all(close(output, wanted) for output in found[:2])
    assert close(found[2], bench.expected(trunk, plain[0])[-1])
    assert bench.forwards.rows == ([4, 1] if sharing == "packed" else [5])


async def test_a_session_of_several_rows_takes_as_many(bench: Bench, trunk: SplitModel) -> None:
    first, second, third = await bench.open(), await bench.open(), await bench.open()
    await bench.start(first, hidden(5, rows=6))
    await bench.start(second, hidden(3, rows=3))
    await bench.start(third, hidden(4, rows=2))
    bench.forwards.rows.clear()
    gate = await bench.hold()
    steps = [
        bench.start(session, hidden(1, rows=rows))
        for session, rows in ((first, 6), (second, 3), (third, 2))
    ]
    await _queued(bench, steps)
    gate.set()

    for session, output in zip((first, second, third), await asyncio.gather(*steps), strict=True):
        assert close(output, bench.expected(trunk, session)[-1])
    assert bench.forwards.rows == [8, 3]


async def test_a_prompt_runs_in_pieces_and_steps_come_between(
    bench: Bench, trunk: SplitModel
) -> None:
    (session,) = await prompts(bench, [3])
    newcomer = await bench.open()
    gate = await bench.hold()
    prompt = bench.start(newcomer, hidden(100))
    await _queued(bench, [prompt])
    step = bench.start(session, hidden(1))
    await _queued(bench, [prompt, step])
    gate.set()

    assert close(await step, bench.expected(trunk, session)[-1])
    assert not prompt.done()
    assert close(await prompt, bench.expected(trunk, newcomer)[-1])
    assert len(bench.forwards.rows) > 4


async def test_who_wants_to_know_hears_how_long_a_step_waited_and_ran(bench: Bench) -> None:
    timed, same, other = [await bench.open(timings=wish) for wish in (True, True, False)]
    for session in (timed, same, other):
        await bench.start(session, hidden(3))
    start = time.perf_counter()
    gate = await bench.hold()
    steps = [bench.start(session, hidden(1)) for session in (timed, same, other)]
    await _queued(bench, steps)
    queued = time.perf_counter()
    for _ in range(1000):
        await asyncio.sleep(0)
    held = time.perf_counter()
    gate.set()
    await asyncio.gather(*steps)
    end = time.perf_counter()

    assert bench.said[other] == {}
    for session in (timed, same):
        said = bench.said[session]
        assert sorted(said) == ["forward_us", "queue_us"]
        assert all(type(value) is int for value in said.values())
        assert said["queue_us"] >= (held - queued) * 1e6 - 1
        assert sum(said.values()) <= (end - start) * 1e6 + 1
    assert bench.said[timed]["forward_us"] == bench.said[same]["forward_us"] > 0


async def test_a_prompt_in_pieces_says_what_all_of_them_waited_and_ran(
    bench: Bench, trunk: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("piece", "room"):  # however long a step takes here
        monkeypatch.setattr(batcher.Pace, name, lambda *_, **__: 16)
    (session,) = await prompts(bench, [3])
    newcomer = await bench.open(timings=True)
    spans: list[tuple[int, float]] = []

    def note(_: Any, args: Any) -> None:
        spans.append((HiddenState.of(args[0]).shape[1], time.perf_counter()))

    def note_end(*_: Any) -> None:
        new, began = spans.pop()
        spans.append((new, time.perf_counter() - began))

    gate = await bench.hold()
    start = time.perf_counter()
    prompt = bench.start(newcomer, hidden(100))
    await _queued(bench, [prompt])
    step = bench.start(session, hidden(1))
    await _queued(bench, [prompt, step])
    with (
        closing_hook(trunk.register_forward_pre_hook(note)),
        closing_hook(trunk.register_forward_hook(note_end)),
    ):
        gate.set()
        await asyncio.gather(prompt, step)
    end = time.perf_counter()

    said = bench.said[newcomer]
    pieces = [seconds for new, seconds in spans if new > 1]
    others = [seconds for new, seconds in spans if new == 1]
    assert (len(pieces) > 4, len(others)) == (True, 1)
    assert said["forward_us"] >= sum(pieces) * 1e6 - 1
    assert said["queue_us"] >= sum(others) * 1e6 - 1
    assert sum(said.values()) <= (end - start) * 1e6 + 1


async def test_two_prompts_take_turns(bench: Bench, trunk: SplitModel) -> None:
    long, short = await bench.open(), await bench.open()
    gate = await bench.hold()
    first = bench.start(long, hidden(100))
    second = bench.start(short, hidden(10))
    await _queued(bench, [first, second])
    gate.set()

    assert close(await second, bench.expected(trunk, short)[-1])
    assert not first.done()
    assert close(await first, bench.expected(trunk, long)[-1])


async def test_what_is_wrong_with_one_is_wrong_with_it_alone(
    bench: Bench, trunk: SplitModel
) -> None:
    good, bad = await prompts(bench, [3, 4])
    gate = await bench.hold()
    steps = [
        bench.start(good, hidden(1)),
        bench.start(bad, hidden(1), torch.tensor([[10**6]])),
    ]
    await _queued(bench, steps)
    gate.set()

    assert close(await steps[0], bench.expected(trunk, good)[-1])
    with pytest.raises(BadStepError, match="position_ids must be"):
        await steps[1]
    bench.given[bad].pop()
    again = await bench.start(bad, hidden(1, seed=5))
    assert torch.equal(again, bench.expected(trunk, bad)[-1])


async def test_a_batch_that_fails_is_run_one_by_one(
    bench: Bench, trunk: SplitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad, other = await prompts(bench, [3, 4, 5])
    real = trunk.forward

    def fails_for_the_bad_one(inputs: torch.Tensor, **kwargs: Any) -> Any:
        output = real(inputs, **kwargs)
        if (inputs == 7.0).any():
            raise ArithmeticError("seven")
        return output

    monkeypatch.setattr(trunk, "forward", fails_for_the_bad_one)
    gate = await bench.hold()
    steps = [
        bench.start(good, hidden(1)),
        bench.start(bad, torch.full((1, 1, 64), 7.0)),
        bench.start(other, hidden(1)),
    ]
    await _queued(bench, steps)
    gate.set()
    results = await asyncio.gather(*steps, return_exceptions=True)

    monkeypatch.undo()
    assert isinstance(results[1], StepFailedError)
    for session, output in ((good, results[0]), (other, results[2])):
        assert isinstance(output, torch.Tensor)
        assert torch.equal(output, bench.expected(trunk, session)[-1])
    assert len(bench.table) == 2


async def test_who_goes_before_its_turn_is_not_run(bench: Bench, trunk: SplitModel) -> None:
    stays, goes = await prompts(bench, [3, 4])
    gate = await bench.hold()
    gone = bench.start(goes, hidden(1))
    step = bench.start(stays, hidden(1))
    await _queued(bench, [gone, step])
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.set()

    assert close(await step, bench.expected(trunk, stays)[-1])
    assert bench.forwards.rows == [1]
    assert len(bench.table) == 1


async def test_no_task_is_left_when_the_last_session_is_closed(bench: Bench) -> None:
    sessions = await prompts(bench, [3, 4])
    assert _batchers() == ["batcher-trunk"]
    for session in sessions:
        bench.table.close(session, CloseReason.CLOSED)
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert _batchers() == []


def _batchers() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("batcher-")]


async def _queued(bench: Bench, steps: list[asyncio.Task[torch.Tensor]]) -> None:
    """Wait until every step has begun to wait for its turn."""
    del bench
    for _ in range(4 * len(steps)):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("most", "after"), [(400, [3]), (150, [2, 3])])
@pytest.mark.parametrize("bench", [BatchLimits(rows=8, piece=100)], indirect=True)
async def test_what_prompts_have_freed_goes_back_when_none_waits_or_after_many(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, most: int, after: list[int]
) -> None:
    returned: list[int] = []
    monkeypatch.setattr(batcher, "_UNTIDY", 80)
    monkeypatch.setattr(batcher, "_VERY_UNTIDY", most)
    monkeypatch.setattr(
        batcher, "return_freed_memory", lambda: returned.append(len(bench.forwards.rows))
    )
    sessions = [await bench.open() for _ in range(3)]
    gate = await bench.hold()
    steps = [bench.start(session, hidden(100)) for session in sessions]
    await _queued(bench, steps)
    gate.set()

    await asyncio.gather(*steps)

    assert returned == after


@pytest.mark.parametrize("model_type", ["mamba", "falcon_h1", "qwen3_next"])
@pytest.mark.parametrize("bench", [BatchLimits(rows=8, piece=16)], indirect=True)
async def test_states_are_each_sessions_own(bench: Bench, model_type: str) -> None:
    """Recurrent states are stacked and given back; one of the sessions is another's fork."""
    part = load_ends(model_type)[1]
    bench.loader.part = part
    await bench.manager.load_model(trunk_config("other"))
    sessions = [await bench.table.open(Owner(), "other") for _ in range(2)]
    for number, session in enumerate(sessions):
        await bench.start(session, hidden(3 + number, seed=number))
    bench.table.claim(sessions[0].owner, sessions[0].id)
    fork = await bench.table.fork(sessions[0])
    bench.table.release(sessions[0])
    bench.given[fork] = list(bench.given[sessions[0]])
    sessions.append(fork)
    bench.forwards.rows.clear()

    for turn in range(3):
        gate = await bench.hold("other")
        steps = [bench.start(s, hidden(1, seed=10 * turn + n)) for n, s in enumerate(sessions)]
        await _queued(bench, steps)
        gate.set()
        for session, output in zip(sessions, await asyncio.gather(*steps), strict=True):
            assert close(output, bench.expected(part, session)[-1])

    assert bench.forwards.rows == [3, 3, 3]
