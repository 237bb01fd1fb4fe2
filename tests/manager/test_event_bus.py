from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import FakeLoader, until

from splitlearn_manager.core.event_bus import HISTORY_LENGTH, EventBus
from splitlearn_manager.core.events import (
    EventsLostEvent,
    ProgressEvent,
    ReloadFailedEvent,
    TransitionEvent,
)
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import ModelFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager

    Config = Callable[..., ModelConfig]

pytestmark = pytest.mark.anyio


def event(number: int) -> TransitionEvent:
    """Return an event with a number."""
    return TransitionEvent("a", number, None, ModelStatus.LOADING, "", 0.0, at=float(number))


def numbers(events: list[Any]) -> list[Any]:
    """Return what a reader got: numbers, and what was lost as (how many, since when)."""
    return [(e.count, e.at) if isinstance(e, EventsLostEvent) else e.generation for e in events]


async def test_every_reader_gets_every_event_from_when_it_came() -> None:
    bus = EventBus()
    with bus.subscribe() as early:
        bus.publish(event(1))
        with bus.subscribe() as late:
            bus.publish(event(2))
            bus.close()
            assert numbers([e async for e in early]) == [1, 2]
            assert numbers([e async for e in late]) == [2]
    assert len(bus) == 0


async def test_a_slow_reader_is_told_what_it_lost_where_it_would_have_been() -> None:
    bus = EventBus()
    with bus.subscribe(length=3) as slow, bus.subscribe() as fast:
        for number in range(1, 8):
            bus.publish(event(number))
        assert numbers([await anext(slow), await anext(slow)]) == [(4, 1.0), 5]
        for number in range(8, 11):
            bus.publish(event(number))
        bus.close()

        assert numbers([e async for e in slow]) == [(2, 6.0), 8, 9, 10]
        assert numbers([e async for e in fast]) == list(range(1, 11))


async def test_a_reader_that_never_reads_takes_bounded_room() -> None:
    bus = EventBus()
    with bus.subscribe(length=5) as reader:
        for number in range(10_000):
            bus.publish(event(number))

        assert len(reader._queue) == 5
        assert numbers([await anext(reader)]) == [(9995, 0.0)]


async def test_a_reader_waits_for_news_and_can_be_cancelled_without_losing_any() -> None:
    bus = EventBus()
    with bus.subscribe() as reader:
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        assert not waiting.done()
        bus.publish(event(1))

        assert (await waiting).generation == 1


async def test_closing_ends_those_who_wait_and_those_who_come_later() -> None:
    bus = EventBus()
    with bus.subscribe() as reader:
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        bus.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
    with bus.subscribe() as late:
        assert [e async for e in late] == []


async def test_a_reader_that_left_gets_no_more() -> None:
    bus = EventBus()
    with bus.subscribe() as reader:
        pass
    bus.publish(event(1))

    assert len(reader._queue) == 0


def test_a_queue_needs_room() -> None:
    with pytest.raises(ValueError, match="room for 1 at least, found 0"):
        EventBus().subscribe(0)


def reads_weights(event: Any) -> bool:
    """Whether an event tells of a load whose size is known, and whose weights come in."""
    return isinstance(event, ProgressEvent) and event.phase == "reading" and event.bytes_total > 0


async def test_the_stream_has_transitions_and_progress_and_ends_with_the_manager(
    manager: AsyncModelManager, loader: FakeLoader, model_config: Config
) -> None:
    async def read() -> None:
        async for each in manager.events():
            seen.append(each)  # noqa: PERF401 - while it runs, others look at it

    seen: list[Any] = []
    reader = asyncio.create_task(read())
    await until(lambda: len(manager._table.bus) == 1)
    held = loader.hold("a")
    load = asyncio.create_task(manager.load_model(model_config()))
    await until(lambda: any(map(reads_weights, seen)))
    held.release()
    await load
    loader.prepare("a", OSError("disk"))
    with pytest.raises(ModelFailedError):
        await manager.reload_model(model_config())
    await manager.unload_model("a")
    await manager.shutdown()
    await reader

    moves = [(e.old, e.new) for e in seen if isinstance(e, TransitionEvent)]
    assert moves == [
        (None, "loading"),
        ("loading", "ready"),
        ("ready", "unloading"),
        ("unloading", None),
    ]
    progress = next(filter(reads_weights, seen))
    begun = seen[0]
    assert (progress.model_id, progress.generation, progress.bytes_total) == ("a", 1, 60)
    assert progress.operation_id == begun.operation_id != ""
    (failed,) = (e for e in seen if isinstance(e, ReloadFailedEvent))
    assert (failed.generation, failed.code, failed.reason) == (2, "storage", "OSError: disk")
    assert len(manager._table.bus) == 0


async def test_each_operation_has_an_id_of_its_own(
    manager: AsyncModelManager, model_config: Config
) -> None:
    seen: list[TransitionEvent] = []
    manager.on_transition.append(seen.append)
    await manager.load_model(model_config())
    await manager.reload_model(model_config())
    await manager.unload_model("a")
    await until(lambda: not manager._owners)

    by_operation: dict[str, list[tuple[int, str | None]]] = {}
    for each in seen:
        by_operation.setdefault(each.operation_id, []).append((each.generation, each.new))
    assert list(by_operation.values()) == [
        [(1, "loading"), (1, "ready")],
        [(2, "ready")],
        [(1, "unloading"), (1, None)],
        [(2, "unloading"), (2, None)],
    ]


async def test_a_reader_that_was_away_goes_on_where_it_was() -> None:
    bus = EventBus()
    bus.publish(event(1))
    with bus.subscribe() as events:
        at_the_start = events.position
        assert not events.resumed
        bus.publish(event(2))
        bus.publish(event(3))
        await anext(events)
        position = events.position
    bus.publish(event(4))
    for after, missed in ((at_the_start, [2, 3, 4]), (position, [3, 4]), (bus.position(), [])):
        with bus.subscribe(after=after) as events:
            assert events.resumed
            assert events.position == after
            bus.publish(event(9))
            got = [await anext(events) for _ in (*missed, 9)]
            assert numbers(got[: len(missed)]) == missed
            assert events.position == bus.position()
        bus._history.pop()
        bus._number -= 1


async def test_what_is_not_kept_any_more_is_told_first() -> None:
    bus = EventBus()
    position = bus.position()
    for number in range(1, HISTORY_LENGTH + 3):
        bus.publish(event(number))
    with bus.subscribe(after=position) as events:
        assert not events.resumed
        assert numbers([await anext(events)]) == [(HISTORY_LENGTH + 2, 3.0)]
        bus.publish(event(7))
        assert numbers([await anext(events)]) == [7]
    with bus.subscribe(after=EventBus().position()) as events:
        lost = await anext(events)
        assert isinstance(lost, EventsLostEvent)
        assert lost.count is None


async def test_a_slow_reader_that_had_lost_unknown_many_stays_so() -> None:
    bus = EventBus()
    with bus.subscribe(length=1, after="elsewhere") as events:
        bus.publish(event(1))
        bus.publish(event(2))
        lost = await anext(events)
        assert isinstance(lost, EventsLostEvent)
        assert lost.count is None
        assert numbers([await anext(events)]) == [2]
