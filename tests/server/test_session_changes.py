"""What sessions do besides steps: roll back, reorder, fork, and outlive their connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from joining import alone, load_ends
from serving_fakes import OnePart, Owner, hidden, trunk_config

from splitlearn_core import SplitModel
from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving.errors import (
    BadPositionError,
    BadStepError,
    RollBackError,
    SessionError,
    TooManySessionsError,
    UnknownSessionError,
)
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import CloseReason, Frame, Kind, TensorName, decode

pytestmark = pytest.mark.anyio

RESUME = 10.0
TYPES = ["llama", "gemma2", "falcon_h1", "recurrent_gemma"]


class Naps:
    """Sleeps that end when the test says so: those of who waits for a client; others never."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.over = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        await (self.over if seconds == RESUME else asyncio.Event()).wait()


class Bench:
    """A table of two sessions of one part."""

    def __init__(
        self, manager: AsyncModelManager, table: SessionTable, part: SplitModel, naps: Naps
    ) -> None:
        self.manager, self.table, self.part, self.naps = manager, table, part, naps
        self._request = 0

    async def open(self, **wishes: Any) -> Session:
        return await self.table.open(Owner(), "trunk", **wishes)

    async def ask(self, session: Session, frame: Frame) -> Any:
        """Do what a frame asks for, as a connection does."""
        work = {Kind.STEP: self.table.step, Kind.ROLL_BACK: self.table.roll_back}
        work[Kind.REORDER] = self.table.reorder
        self.table.claim(session.owner, session.id)
        try:
            return decode(await work[frame.kind](session, frame))
        finally:
            self.table.release(session)

    def frame(self, session: Session, given: torch.Tensor, request: int = 0) -> Frame:
        self._request += 1
        tensor = tensor_to_wire(TensorName.HIDDEN_STATES, given)
        number = request or self._request
        return Frame(Kind.STEP, number, session.id, session.state.length, tensors=(tensor,))

    def frame_at(self, session: Session, given: torch.Tensor, position: int) -> Frame:
        return replace(self.frame(session, given), position=position)

    async def step(self, session: Session, given: torch.Tensor) -> torch.Tensor:
        reply = await self.ask(session, self.frame(session, given))
        return tensor_from_wire(reply.tensor(TensorName.HIDDEN_STATES))

    async def roll_back(self, session: Session, length: int) -> Frame:
        reply: Frame = await self.ask(session, Frame(Kind.ROLL_BACK, 77, session.id, length))
        return reply

    async def reorder(self, session: Session, rows: Any) -> Frame:
        frame = Frame(Kind.REORDER, 78, session.id, info={"rows": rows})
        reply: Frame = await self.ask(session, frame)
        return reply

    def expected(self, *given: torch.Tensor) -> torch.Tensor:
        """Return what the last of some steps gives."""
        with torch.inference_mode():
            return alone(self.part, [HiddenState(one) for one in given])[-1]


@pytest.fixture(params=["llama"])
async def bench(request: Any) -> AsyncIterator[Bench]:
    part = load_ends(request.param)[1]
    naps = Naps()
    resources = ResourceManager(memory_limit=1 << 30)
    loader = OnePart(part)
    async with AsyncModelManager(resources, loader=loader, single_threaded=False) as manager:
        await manager.load_model(trunk_config("trunk"))
        async with SessionTable(
            manager,
            max_sessions=2,
            idle_timeout=1000,
            resume_timeout=RESUME,
            metrics=Metrics(),
            sleep=naps.sleep,
        ) as table:
            yield Bench(manager, table, part, naps)
        del loader.part, part


A, B, C, D = (hidden(n, seed=n) for n in (5, 4, 3, 2))


# --- Roll back -----------------------------------------------------------------------------


@pytest.mark.parametrize("bench", ["llama", "gpt2"], indirect=True)
async def test_positions_that_are_taken_back_were_never_there(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, A)
    await bench.step(session, B)

    done = await bench.roll_back(session, 7)

    assert (done.kind, done.request, done.position) == (Kind.DONE, 77, 7)
    assert close(await bench.step(session, C), bench.expected(A, B[:, :2], C))


@pytest.mark.parametrize("bench", ["gemma2"], indirect=True)
async def test_beyond_a_sliding_window_the_last_step_can_be_taken_back_if_asked_for(
    bench: Bench,
) -> None:
    window = bench.part.config.sliding_window
    long = hidden(window + 3)
    plain, recording = await bench.open(), await bench.open(rollback=True)
    for session in (plain, recording):
        await bench.step(session, long)
        await bench.step(session, B)

    with pytest.raises(RollBackError, match="open the session with rollback"):
        await bench.roll_back(plain, window + 4)
    assert close(await bench.step(plain, C), bench.expected(long, B, C))

    await bench.roll_back(recording, window + 4)
    assert close(await bench.step(recording, C), bench.expected(long, B[:, :1], C))
    with pytest.raises(RollBackError, match="has forgotten"):
        await bench.roll_back(recording, 2)


@pytest.mark.parametrize("bench", ["falcon_h1", "mamba"], indirect=True)
async def test_states_can_not_be_taken_back(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, A)

    with pytest.raises(RollBackError, match="keep states"):
        await bench.roll_back(session, 3)
    with pytest.raises(RollBackError, match="can't roll back"):
        await bench.open(rollback=True)
    assert close(await bench.step(session, B[:, :1]), bench.expected(A, B[:, :1]))
    assert len(bench.table) == 1


@pytest.mark.parametrize("length", [6, 2**32 - 1])
async def test_what_is_not_there_can_not_be_left(bench: Bench, length: int) -> None:
    session = await bench.open()
    await bench.step(session, A)

    with pytest.raises(RollBackError, match="holds 5 positions"):
        await bench.roll_back(session, length)
    await bench.roll_back(session, 0)
    assert close(await bench.step(session, B), bench.expected(B))


# --- Rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", TYPES, indirect=True)
@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1], [1]])
async def test_rows_go_where_they_are_told(bench: Bench, rows: list[int]) -> None:
    session = await bench.open()
    first, second = hidden(5, rows=2), hidden(1, rows=len(rows), seed=9)
    await bench.step(session, first)

    await bench.reorder(session, rows)

    assert close(await bench.step(session, second), bench.expected(first[rows], second))


@pytest.mark.parametrize("rows", [[], [2], [-1], [True], "0", None, [0.5], [0] * 5000])
async def test_rows_that_are_none(bench: Bench, rows: Any) -> None:
    session = await bench.open()
    first = hidden(5, rows=2)
    await bench.step(session, first)

    with pytest.raises(BadStepError, match="rows"):
        await bench.reorder(session, rows)
    second = hidden(1, rows=2, seed=3)
    assert close(await bench.step(session, second), bench.expected(first, second))


# --- Fork ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", TYPES, indirect=True)
async def test_a_fork_goes_its_own_way(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, A)
    bench.table.claim(session.owner, session.id)
    fork = await bench.table.fork(session)
    bench.table.release(session)
    one, other = hidden(1, seed=1), hidden(1, seed=2)

    found = [await bench.step(session, one), await bench.step(fork, other)]

    assert close(found[0], bench.expected(A, one))
    assert close(found[1], bench.expected(A, other))
    assert fork.owner is session.owner
    with pytest.raises(TooManySessionsError):
        await bench.table.fork(session)
    assert len(bench.table) == 2


# --- Without a connection ------------------------------------------------------------------


async def test_a_session_waits_for_its_client_and_answers_its_last_step_again(
    bench: Bench,
) -> None:
    session = await bench.open(resume=True)
    await bench.step(session, A)
    frame = bench.frame(session, B, request=50)
    first = await bench.ask(session, frame)
    bench.table.close_owned(session.owner, lost=True)
    newcomer = Owner()

    resumed = await bench.table.resume(newcomer, session.id, session.token)
    again = await bench.ask(session, frame)

    assert resumed is session
    assert session.owner is newcomer
    assert encode_of(again) == encode_of(first)
    assert session.state.length == 9
    with pytest.raises(BadPositionError):
        await bench.ask(session, bench.frame_at(session, B, 5))
    assert close(await bench.step(session, C), bench.expected(A, B, C))


async def test_a_client_that_does_not_come_back_is_not_waited_for_longer(bench: Bench) -> None:
    session = await bench.open(resume=True)
    bench.table.close_owned(session.owner, lost=True)
    await asyncio.sleep(0)
    assert len(bench.table) == 1
    assert bench.naps.asked[-1] == RESUME

    bench.naps.over.set()
    async with asyncio.timeout(30):
        while len(bench.table):  # noqa: ASYNC110 - the table tells nobody when it is empty
            await asyncio.sleep(0)


async def test_a_session_of_which_resuming_was_not_asked_ends_with_its_connection(
    bench: Bench,
) -> None:
    session = await bench.open()
    owner: Any = session.owner
    bench.table.close_owned(owner, lost=True)

    assert owner.heard == [CloseReason.CLOSED]
    assert len(bench.table) == 0


@pytest.mark.parametrize("token", ["", "0" * 32])
async def test_without_the_token_nobody_takes_a_session_over(bench: Bench, token: str) -> None:
    session = await bench.open(resume=True)
    plain = await bench.open()
    for wanted in (session.id, plain.id, 12345):
        with pytest.raises(UnknownSessionError, match="to be resumed"):
            await bench.table.resume(Owner(), wanted, token)


async def test_whoever_has_the_token_need_not_wait_until_the_old_connection_is_lost(
    bench: Bench,
) -> None:
    session = await bench.open(resume=True)
    old, new = session.owner, Owner()
    await bench.table.resume(new, session.id, session.token)

    with pytest.raises(SessionError):
        bench.table.find(old, session.id)
    bench.table.close_owned(old, lost=True)
    assert bench.table.find(new, session.id) is session


async def test_a_shutdown_waits_for_no_client(bench: Bench) -> None:
    session = await bench.open(resume=True)
    bench.table.close_owned(session.owner, lost=True)

    assert await bench.table.drain(1) is True
    assert len(bench.table) == 0


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether they are equal but for the order of sums, which depends on the shapes."""
    return bool((found - wanted).abs().max() / wanted.abs().max() <= 2e-6)


def encode_of(frame: Frame) -> list[tuple[Any, bytes]]:
    return [(tensor.name, bytes(tensor.data)) for tensor in frame.tensors]


async def test_only_the_same_request_is_answered_again(bench: Bench) -> None:
    """Numbers alone don't tell: a client may give the same to all of its requests."""
    session = await bench.open(resume=True)
    first, second = hidden(5, rows=2), hidden(1, rows=2, seed=3)
    await bench.ask(session, bench.frame(session, first, request=7))
    for rows in ([1, 0], [1, 1]):
        frame = Frame(Kind.REORDER, 7, session.id, info={"rows": rows})
        assert (await bench.ask(session, frame)).kind is Kind.DONE
        assert (await bench.ask(session, frame)).kind is Kind.DONE

    assert close(await bench.step(session, second), bench.expected(first[[0, 0]], second))


async def test_a_fork_whose_client_has_gone_is_not_made(bench: Bench) -> None:
    session = await bench.open(resume=True)
    await bench.step(session, A)
    bench.table.claim(session.owner, session.id)
    fork = asyncio.create_task(bench.table.fork(session))
    await asyncio.sleep(0)
    bench.table.close_owned(session.owner, lost=True)

    with pytest.raises(UnknownSessionError, match="is gone"):
        await fork
    bench.table.release(session)
    assert len(bench.table) == 1


@pytest.mark.parametrize("token", ["\u00e9" * 32])
async def test_a_token_of_any_letters_is_refused(bench: Bench, token: str) -> None:
    session = await bench.open(resume=True)

    with pytest.raises(UnknownSessionError, match="to be resumed"):
        await bench.table.resume(Owner(), session.id, token)


@pytest.mark.parametrize("bench", ["mamba"], indirect=True)
async def test_memory_of_states_is_counted_when_it_is_seen(bench: Bench) -> None:
    session = await bench.open()
    before = bench.manager.resource_manager.get_current_usage().reserved_bytes
    await bench.step(session, A)

    after = bench.manager.resource_manager.get_current_usage().reserved_bytes
    assert after - before == session.state.cache.allocated_nbytes > 0
    bench.table.close(session, CloseReason.CLOSED)
    assert bench.manager.resource_manager.get_current_usage().reserved_bytes == before
