"""The table of sessions, with a real manager and a Trunk that waits where it is told to."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from serving_fakes import trunk_config

from splitlearn_manager import AsyncModelManager
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import ModelNotFoundError, ModelUnloadingError
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving.errors import (
    BadOpenError,
    BadPositionError,
    BadStepError,
    DrainingError,
    ModelUnavailableError,
    SessionError,
    StepFailedError,
    TooLongError,
    TooManySessionsError,
    UnknownSessionError,
    UnsupportedComponentError,
)
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import CloseReason, Frame, Kind, TensorName, decode

pytestmark = pytest.mark.anyio

IDLE = 100.0


class Owner:
    """A connection that remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, CloseReason]] = []

    def session_closed(self, session: Session, reason: CloseReason) -> None:
        self.heard.append((session.id, reason))


class FakeTime:
    """A clock that moves when the test says so, and wakes who slept long enough."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleepers: dict[asyncio.Event, float] = {}
        self.asleep = asyncio.Event()

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        self.sleepers[woken] = self.now + seconds
        self.asleep.set()
        await woken.wait()
        del self.sleepers[woken]

    async def advance(self, seconds: float) -> None:
        """Move on, and return when whoever woke up sleeps again, or waits for something else."""
        self.now += seconds
        for woken, until in self.sleepers.items():
            if until <= self.now:
                woken.set()
        await settle()


async def settle() -> None:
    """Let every task run until it waits for something that is not on this event loop."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def table(
    manager: AsyncModelManager, time: FakeTime, metrics: Metrics
) -> AsyncIterator[SessionTable]:
    async with SessionTable(
        manager,
        max_sessions=2,
        idle_timeout=IDLE,
        metrics=metrics,
        clock=time.clock,
        sleep=time.sleep,
    ) as table:
        yield table


def step_frame(
    session: Session,
    new: int = 1,
    batch: int = 1,
    *,
    position: int | None = None,
    hidden: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Frame:
    hidden = torch.ones(batch, new, 4) if hidden is None else hidden
    given = [
        (TensorName.HIDDEN_STATES, hidden),
        (TensorName.ATTENTION_MASK, mask),
        (TensorName.POSITION_IDS, positions),
    ]
    tensors = tuple(tensor_to_wire(name, tensor) for name, tensor in given if tensor is not None)
    position = session.state.length if position is None else position
    return Frame(Kind.STEP, 1, session.id, position, tensors=tensors)


async def run_step(table: SessionTable, session: Session, frame: Frame) -> Frame:
    """Run a step as a connection does."""
    table.claim(session.owner, session.id)
    try:
        return decode(await table.step(session, frame))
    finally:
        table.release(session)


def start_step(table: SessionTable, session: Session, frame: Frame) -> asyncio.Task[bytes]:
    """Start a step as a connection does, without waiting for it."""
    table.claim(session.owner, session.id)
    task = asyncio.ensure_future(table.step(session, frame))
    session.task = task  # type: ignore[assignment]
    task.add_done_callback(lambda _: table.release(session))
    return task


async def entered(part: Any) -> None:
    """Wait until a forward has begun."""
    await asyncio.to_thread(part.entered.acquire)


async def test_steps_of_any_length_fill_one_cache(table: SessionTable, part: Any) -> None:
    session = await table.open(Owner(), "trunk")

    first = await run_step(table, session, step_frame(session, new=3))
    second = await run_step(table, session, step_frame(session, new=1))

    assert (first.kind, first.position, second.position) == (Kind.RESULT, 3, 4)
    assert torch.equal(tensor_from_wire(first.tensors[0]), torch.full((1, 3, 4), 2.0))
    caches = [call["past_key_values"] for call in part.calls]
    assert caches == [session.state.cache] * 2
    assert session.state.cache.length == 4


async def test_no_mask_sent_is_no_mask_given(table: SessionTable, part: Any) -> None:
    session = await table.open(Owner(), "trunk")

    await run_step(table, session, step_frame(session))

    assert part.calls[0]["attention_mask"] is None
    assert part.calls[0]["position_ids"] is None
    assert part.calls[0]["use_cache"] is True


async def test_masks_are_put_together_from_their_columns(table: SessionTable, part: Any) -> None:
    session = await table.open(Owner(), "trunk")
    columns = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)

    await run_step(table, session, step_frame(session, new=1, batch=2))
    await run_step(table, session, step_frame(session, new=2, batch=2, mask=columns))
    await run_step(table, session, step_frame(session, new=1, batch=2))

    masks = [call["attention_mask"] for call in part.calls]
    assert masks[0] is None
    assert masks[1].tolist() == [[1, 0, 1], [1, 1, 1]]
    assert masks[2].tolist() == [[1, 0, 1, 1], [1, 1, 1, 1]]
    assert masks[2].dtype is torch.int64


async def test_position_ids_arrive_as_sent(table: SessionTable, part: Any) -> None:
    session = await table.open(Owner(), "trunk")
    ids = torch.tensor([[0, 15]])

    await run_step(table, session, step_frame(session, new=2, positions=ids))

    assert part.calls[0]["position_ids"].tolist() == [[0, 15]]


Change = Callable[[Session], Frame]
REFUSED: list[tuple[Change, type[SessionError], str]] = [
    (lambda s: Frame(Kind.STEP, 1, s.id, 2), BadStepError, "has no hidden_states"),
    (
        lambda s: step_frame(s, hidden=torch.ones(2, 1, 4, dtype=torch.float16)),
        BadStepError,
        r"must be FP32 \[2, new, 4\], found FP16 \[2, 1, 4\]",
    ),
    (lambda s: step_frame(s, hidden=torch.ones(2, 1, 5)), BadStepError, r"found FP32 \[2, 1, 5\]"),
    (lambda s: step_frame(s, hidden=torch.ones(2, 4)), BadStepError, r"found FP32 \[2, 4\]"),
    (lambda s: step_frame(s, batch=3), BadStepError, r"found FP32 \[3, 1, 4\]"),
    (lambda s: step_frame(s, batch=2, position=3), BadPositionError, "position 3, .* holds 2"),
    (lambda s: step_frame(s, batch=2, position=1), BadPositionError, "position 1, .* holds 2"),
    (lambda s: step_frame(s, 15, 2), TooLongError, "position 17, the session has 16"),
    (
        lambda s: step_frame(s, batch=2, mask=torch.ones(2, 2, dtype=torch.uint8)),
        BadStepError,
        r"attention_mask must be UINT8 \[2, 1\], found UINT8 \[2, 2\]",
    ),
    (
        lambda s: step_frame(s, batch=2, mask=torch.ones(2, 1, dtype=torch.int64)),
        BadStepError,
        r"attention_mask must be UINT8 \[2, 1\], found INT64",
    ),
    (
        lambda s: step_frame(s, batch=2, positions=torch.ones(1, 1, dtype=torch.int64)),
        BadStepError,
        r"position_ids must be INT64 \[2, 1\], found INT64 \[1, 1\]",
    ),
    (
        lambda s: step_frame(s, batch=2, positions=torch.tensor([[0], [16]])),
        BadStepError,
        "position_ids must be 0 to 15, found 0 to 16",
    ),
    (
        lambda s: step_frame(s, batch=2, positions=torch.tensor([[-1], [0]])),
        BadStepError,
        "found -1 to 0",
    ),
]


@pytest.mark.parametrize(("make", "error", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
async def test_a_refused_step_leaves_the_session_as_it_was(
    table: SessionTable, part: Any, make: Change, error: type[SessionError], said: str
) -> None:
    session = await table.open(Owner(), "trunk")
    await run_step(table, session, step_frame(session, new=2, batch=2))

    with pytest.raises(error, match=said):
        await run_step(table, session, make(session))

    assert len(part.calls) == 1
    result = await run_step(table, session, step_frame(session, batch=2))
    assert result.position == 3


async def test_a_session_takes_all_the_positions_of_the_model(table: SessionTable) -> None:
    session = await table.open(Owner(), "trunk")

    result = await run_step(table, session, step_frame(session, new=16))

    assert result.position == 16
    with pytest.raises(TooLongError):
        await run_step(table, session, step_frame(session))


async def test_a_client_may_ask_for_fewer_positions(table: SessionTable) -> None:
    session = await table.open(Owner(), "trunk", max_length=3)

    with pytest.raises(TooLongError, match="position 4, the session has 3"):
        await run_step(table, session, step_frame(session, new=4))


@pytest.mark.parametrize("wanted", [0, -1, 1.5, "8", True, [8]])
async def test_what_is_no_number_of_positions_is_refused(table: SessionTable, wanted: Any) -> None:
    with pytest.raises(BadOpenError, match="must be a number of positions"):
        await table.open(Owner(), "trunk", wanted)
    assert len(table) == 0


async def test_more_positions_than_the_model_has_are_refused(table: SessionTable) -> None:
    with pytest.raises(TooLongError, match="max_length is 17, the model has 16"):
        await table.open(Owner(), "trunk", 17)


async def test_sessions_are_limited_in_number(table: SessionTable) -> None:
    owner = Owner()
    first = await table.open(owner, "trunk")
    await table.open(Owner(), "trunk")

    with pytest.raises(TooManySessionsError, match="2 sessions"):
        await table.open(owner, "trunk")

    table.close(first, CloseReason.CLOSED)
    await table.open(owner, "trunk")


async def test_only_a_trunk_has_sessions(table: SessionTable, manager: AsyncModelManager) -> None:
    await manager.load_model(trunk_config("top"))

    with pytest.raises(UnsupportedComponentError, match="this is 'top'"):
        await table.open(Owner(), "top")
    with pytest.raises(ModelNotFoundError):
        await table.open(Owner(), "nothing")


async def test_a_part_whose_dtype_does_not_travel_has_no_sessions(
    table: SessionTable, part: Any
) -> None:
    part.dtype = torch.float64

    with pytest.raises(UnsupportedComponentError, match="float64 does not travel"):
        await table.open(Owner(), "trunk")


async def test_nobody_can_use_anothers_session(table: SessionTable) -> None:
    session = await table.open(Owner(), "trunk")

    with pytest.raises(UnknownSessionError, match=f"no session {session.id:#010x}"):
        table.find(Owner(), session.id)
    with pytest.raises(UnknownSessionError):
        table.claim(Owner(), session.id)


async def test_one_step_at_a_time(table: SessionTable, part: Any) -> None:
    session = await table.open(Owner(), "trunk")
    part.gate.clear()
    step = start_step(table, session, step_frame(session))

    with pytest.raises(BadStepError, match="has a step in flight"):
        table.claim(session.owner, session.id)

    part.gate.set()
    await step


async def test_a_closed_session_lets_go_of_its_cache(table: SessionTable) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")
    cache = weakref.ref(session.state.cache)

    table.close(session, CloseReason.CLOSED)
    gc.collect()

    assert cache() is None
    assert len(table) == 0
    assert owner.heard == [(session.id, CloseReason.CLOSED)]


async def test_closing_twice_is_heard_once(table: SessionTable) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")

    table.close(session, CloseReason.CLOSED)
    table.close(session, CloseReason.EXPIRED)

    assert len(owner.heard) == 1


async def test_a_busy_session_ends_after_its_answer(table: SessionTable, part: Any) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")
    part.gate.clear()
    step = start_step(table, session, step_frame(session))
    await entered(part)

    table.close_owned(owner)
    table.close(session, CloseReason.EXPIRED)
    assert owner.heard == []

    part.gate.set()
    assert decode(await step).position == 1
    await settle()
    assert owner.heard == [(session.id, CloseReason.CLOSED)]
    assert session.state.cache is None


async def test_a_step_that_fails_half_way_ends_its_session(table: SessionTable, part: Any) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")
    part.fail_with = RuntimeError("secret detail")

    with pytest.raises(StepFailedError) as caught:
        await run_step(table, session, step_frame(session))

    assert "secret" not in str(caught.value)
    assert owner.heard == [(session.id, CloseReason.INTERNAL)]
    assert len(table) == 0


async def test_a_part_that_answers_in_another_shape_is_a_failure(
    table: SessionTable, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await table.open(Owner(), "trunk")
    monkeypatch.setattr(type(part), "__call__", lambda *_, **__: torch.ones(1, 1, 3))

    with pytest.raises(StepFailedError):
        await run_step(table, session, step_frame(session))


async def test_idle_sessions_expire_each_at_its_own_time(
    table: SessionTable, time: FakeTime
) -> None:
    owner = Owner()
    first = await table.open(owner, "trunk")
    await time.asleep.wait()
    await time.advance(40)
    second = await table.open(owner, "trunk")
    await time.advance(59)
    assert len(table) == 2

    await time.advance(1)
    assert owner.heard == [(first.id, CloseReason.EXPIRED)]

    await time.advance(39)
    assert len(table) == 1
    await time.advance(1)
    assert owner.heard[1:] == [(second.id, CloseReason.EXPIRED)]


async def test_a_step_puts_off_the_end(table: SessionTable, time: FakeTime) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")
    await time.asleep.wait()
    await time.advance(99)
    await run_step(table, session, step_frame(session))

    await time.advance(99)
    assert len(table) == 1

    await time.advance(1)
    assert owner.heard == [(session.id, CloseReason.EXPIRED)]


async def test_nothing_is_kept_of_a_session_that_has_ended(
    table: SessionTable, time: FakeTime
) -> None:
    """What waits for the next one to expire would keep its load of the model as well."""
    owner = Owner()
    session = await table.open(owner, "trunk")
    await time.asleep.wait()  # until it can expire
    table.close(session, CloseReason.CLOSED)
    kept = weakref.ref(owner)
    del owner, session

    assert kept() is None


async def test_a_long_step_is_not_idle(table: SessionTable, time: FakeTime, part: Any) -> None:
    session = await table.open(Owner(), "trunk")
    await time.asleep.wait()
    part.gate.clear()
    step = start_step(table, session, step_frame(session))
    await entered(part)

    await time.advance(1000)
    assert len(table) == 1
    assert len(time.sleepers) == 1

    part.gate.set()
    await step


async def test_nobody_wakes_up_while_there_is_no_session(
    table: SessionTable, time: FakeTime
) -> None:
    session = await table.open(Owner(), "trunk")
    await time.asleep.wait()
    table.close(session, CloseReason.CLOSED)

    await time.advance(IDLE)

    assert time.sleepers == {}


async def test_sessions_end_with_their_model(
    table: SessionTable, manager: AsyncModelManager, part: Any
) -> None:
    owner = Owner()
    idle = await table.open(owner, "trunk")
    busy = await table.open(owner, "trunk")
    part.gate.clear()
    step = start_step(table, busy, step_frame(busy))
    await entered(part)

    unload = asyncio.create_task(manager.unload_model("trunk", drain_timeout=0))
    with pytest.raises(ModelUnavailableError, match="'trunk' was unloaded or replaced"):
        await step

    part.gate.set()
    await unload
    assert sorted(owner.heard) == sorted(
        [(idle.id, CloseReason.MODEL_UNLOADED), (busy.id, CloseReason.MODEL_UNLOADED)]
    )


async def test_an_open_session_does_not_keep_its_model(
    table: SessionTable, manager: AsyncModelManager, loader: Any
) -> None:
    session = await table.open(Owner(), "trunk")
    await run_step(table, session, step_frame(session))
    part = weakref.ref(loader.parts.pop("trunk"))

    await manager.unload_model("trunk", drain_timeout=0)
    gc.collect()

    assert part() is None


async def test_a_drain_waits_for_a_session_and_lets_it_go_on(
    table: SessionTable, manager: AsyncModelManager
) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")
    unload = asyncio.create_task(manager.unload_model("trunk", drain_timeout=math.inf))
    await settle()

    with pytest.raises(ModelUnloadingError):
        await table.open(owner, "trunk")
    reply = await run_step(table, session, step_frame(session))
    assert reply.kind is Kind.RESULT
    assert not unload.done()
    table.close(session, CloseReason.CLOSED)

    assert await unload is False  # this test still has the part
    assert owner.heard == [(session.id, CloseReason.CLOSED)]


async def test_a_session_stays_with_the_load_that_it_was_opened_on(
    table: SessionTable, manager: AsyncModelManager, loader: Any
) -> None:
    owner = Owner()
    old = await table.open(owner, "trunk")
    first = old.managed
    assert await manager.reload_model(trunk_config("trunk"))

    new = await table.open(owner, "trunk")
    for session in (old, new):
        assert (await run_step(table, session, step_frame(session))).kind is Kind.RESULT

    assert (old.managed is first, new.managed is first) == (True, False)
    assert first.status is ModelStatus.UNLOADING
    table.close(old, CloseReason.CLOSED)
    await first.gone()
    assert len(table) == 1
    loader.parts.clear()


async def test_a_model_with_a_session_is_not_idle(table: SessionTable) -> None:
    session = await table.open(Owner(), "trunk")
    assert not session.managed.is_idle

    table.close(session, CloseReason.CLOSED)

    assert session.managed.is_idle


async def test_draining_answers_what_is_in_flight(table: SessionTable, part: Any) -> None:
    owner = Owner()
    idle = await table.open(owner, "trunk")
    busy = await table.open(owner, "trunk")
    part.gate.clear()
    step = start_step(table, busy, step_frame(busy))
    await entered(part)

    drain = asyncio.create_task(table.drain(30))
    await settle()
    assert owner.heard == [(idle.id, CloseReason.DRAINING)]
    with pytest.raises(DrainingError):
        await table.open(owner, "trunk")

    part.gate.set()
    assert await drain is True
    assert step.done()
    assert decode(step.result()).kind is Kind.RESULT
    assert owner.heard[1:] == [(busy.id, CloseReason.DRAINING)]


async def test_draining_cancels_what_is_not_answered_in_time(
    table: SessionTable, part: Any
) -> None:
    owner = Owner()
    session = await table.open(owner, "trunk")
    part.gate.clear()
    step = start_step(table, session, step_frame(session))
    await entered(part)

    assert await table.drain(0) is False

    assert step.cancelled()
    assert owner.heard == [(session.id, CloseReason.DRAINING)]
    assert len(table) == 0
    part.gate.set()


async def test_leaving_leaves_nothing_behind(manager: AsyncModelManager) -> None:
    before = asyncio.all_tasks()
    observers = list(manager.on_transition)
    owner = Owner()

    async with SessionTable(manager, max_sessions=2, idle_timeout=IDLE, metrics=Metrics()) as table:
        session = await table.open(owner, "trunk")

    assert owner.heard == [(session.id, CloseReason.DRAINING)]
    assert asyncio.all_tasks() == before
    assert manager.on_transition == observers


async def test_what_happens_is_counted(table: SessionTable, metrics: Metrics, part: Any) -> None:
    session = await table.open(Owner(), "trunk")
    await run_step(table, session, step_frame(session, new=3, batch=2))
    with pytest.raises(BadPositionError):
        await run_step(table, session, step_frame(session, batch=2, position=1))
    part.fail_with = ValueError("x")
    open_before = metrics.registry.get_sample_value("splitlearn_sessions_open", {"model": "trunk"})
    with pytest.raises(StepFailedError):
        await run_step(table, session, step_frame(session, batch=2))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model": "trunk", **labels})

    assert open_before == 1
    assert value("splitlearn_sessions_open") == 0
    assert value("splitlearn_session_steps_total", code="ok") == 1
    assert value("splitlearn_session_steps_total", code="bad_position") == 1
    assert value("splitlearn_session_steps_total", code="internal") == 1
    assert value("splitlearn_session_tokens_total", phase="prefill") == 6
    assert value("splitlearn_session_step_duration_seconds_count") == 3
