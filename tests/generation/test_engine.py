"""Whose requests run, when, and what becomes of them; the forwards are made up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from manager_fakes import until
from serving_fakes import FakeLoader, trunk_config

from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.core.entries import AsyncManagedModel
from splitlearn_manager.generation import engine as engines_module
from splitlearn_manager.generation.engine import Engine, EngineLimits, Engines, Ticket
from splitlearn_manager.generation.errors import (
    GenerationFailedError,
    NoCacheMemoryError,
    QueueFullError,
)
from splitlearn_manager.generation.jobs import Event, Failed, Job, Scored, TokenMade
from splitlearn_manager.generation.sampling import Sampling, Wanted
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving import pace as pace_module
from splitlearn_manager.serving.pace import Pace

pytestmark = pytest.mark.anyio

POSITION = 16
"""Bytes of a cache for each position; they are reserved 64 positions at a time."""


class FakeDecoder:
    """Gives each answer a token a step, of those that it was given; steps wait for the gate."""

    def __init__(self) -> None:
        self.chain = SimpleNamespace(bytes_per_position=(POSITION - 8, 8), mixes=False)
        self.jobs: list[Job] = []
        self.rows: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.taken: Callable[[], object] = lambda: None

    @property
    def running(self) -> int:
        return sum(len(job.continuations) for job in self.jobs)

    @property
    def is_idle(self) -> bool:
        return not self.jobs

    has_prompts = False

    def take(self, jobs: list[Job]) -> None:
        self.jobs += jobs
        self.taken()

    def step(self) -> list[Event]:
        assert self.gate.wait(30)
        self.jobs = [job for job in self.jobs if not job.unwanted]
        if self.fails:
            raise ArithmeticError("a step that failed")
        self.rows.append(self.running)
        events: list[Event] = []
        for job in self.jobs:
            for one in job.continuations:
                one.tokens.append(len(one.tokens))
                done = len(one.tokens) == job.wanted.max_tokens
                events.append(TokenMade(one, Scored(one.tokens[-1]), "length" if done else None))
        self.jobs = [j for j in self.jobs if len(j.continuations[0].tokens) < j.wanted.max_tokens]
        return events

    def clear(self) -> None:
        self.jobs.clear()


class Place:
    """Engines over a manager with one model."""

    def __init__(self, manager: AsyncModelManager, managed: AsyncManagedModel) -> None:
        self.manager = manager
        self.managed = managed
        self.decoder = FakeDecoder()

    def engines(self, **limits: Any) -> Engines:
        return Engines(self.manager.resource_manager, EngineLimits(**limits), Metrics())


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    loader = FakeLoader()
    resources = ResourceManager(memory_limit=1 << 16)
    async with AsyncModelManager(resources, loader=loader, single_threaded=False) as manager:
        await manager.load_model(trunk_config("m"))
        managed = await manager.get_model("m")
        assert managed is not None
        place = Place(manager, managed)
        monkeypatch.setattr(engines_module, "_decoder", lambda *_: place.decoder)
        yield place
        place.decoder.gate.set()
        loader.parts.clear()


def job(tokens: int = 3, answers: int = 1, prompt: int = 4) -> Job:
    return Job(tuple(range(prompt)), Sampling(temperature=0), Wanted(tokens, answers))


async def finish(engine: Engine, ticket: Ticket) -> list[Event]:
    """Wait for the end of every answer of a request."""
    events: list[Event] = []
    left = sum(len(one.continuations) for one in ticket.jobs)
    try:
        while left:
            new = await ticket.events()
            events += new
            for event in new:
                if isinstance(event, Failed):
                    raise event.error
                left -= isinstance(event, TokenMade) and event.finish is not None
    finally:
        engine.withdraw(ticket)
    return events


async def gone(engines: Engines) -> None:
    """Wait until no engine is left."""
    await until(lambda: not engines.usage())


@pytest.mark.parametrize(("took", "rows"), [(1.0, [2]), (0.0, [1, 1])])
async def test_prompts_that_come_together_begin_together(
    place: Place, monkeypatch: pytest.MonkeyPatch, took: float, rows: list[int]
) -> None:
    """Where it is known what a position of theirs takes; with a whole piece none waits longer."""
    monkeypatch.setattr(pace_module, "LONGEST_COMPANY_WAIT", 60.0)
    engines = place.engines(piece=512)
    engines._paces[place.managed] = Pace(512, per_position=took * 60)
    admitted = asyncio.Event()
    place.decoder.gate.clear()
    place.decoder.taken = admitted.set
    first = engines.submit(place.managed, [job(tokens=1, prompt=256)])
    if took:
        await asyncio.sleep(0)  # it waits for company
    else:
        await admitted.wait()
    second = engines.submit(place.managed, [job(tokens=1, prompt=256)])
    place.decoder.gate.set()

    await asyncio.gather(finish(*first), finish(*second))

    assert place.decoder.rows == rows
    await gone(engines)


async def test_requests_share_steps_and_nothing_is_left(place: Place) -> None:
    engines = place.engines()
    place.decoder.gate.clear()
    taken = [engines.submit(place.managed, [job(), job()]) for _ in range(3)]
    place.decoder.gate.set()

    events = await asyncio.gather(*(finish(*one) for one in taken))

    assert [len(one) for one in events] == [6, 6, 6]
    assert place.decoder.rows == [6, 6, 6]
    await gone(engines)
    assert place.managed.is_idle
    assert engines.memory.nbytes(place.managed) == 0


async def test_answers_beyond_the_rows_wait_in_their_order(place: Place) -> None:
    engines = place.engines(rows=3)
    taken = [engines.submit(place.managed, [job(2, answers=2)]) for _ in range(3)]
    single = engines.submit(place.managed, [job(2)])

    await asyncio.gather(*(finish(*one) for one in (*taken, single)))

    assert place.decoder.rows == [2, 2, 2, 2, 3, 3]


async def test_one_too_many_is_refused_until_another_was_let_in(place: Place) -> None:
    engines = place.engines(rows=1, waiting=1)
    place.decoder.gate.clear()
    first = engines.submit(place.managed, [job()])
    await until(lambda: first[1].let_in)
    second = engines.submit(place.managed, [job()])

    with pytest.raises(QueueFullError, match="1 requests of model 'm' wait already"):
        engines.submit(place.managed, [job()])

    place.decoder.gate.set()
    await asyncio.gather(finish(*first), finish(*second))
    third = engines.submit(place.managed, [job()])
    assert len(await finish(*third)) == 3


async def test_memory_is_waited_for_and_what_never_fits_is_refused(place: Place) -> None:
    free = (1 << 16) - place.manager.resource_manager.get_current_usage("cpu").reserved_bytes
    fits = free // (64 * POSITION) * 64 - 4
    engines = place.engines()
    place.decoder.gate.clear()
    large = engines.submit(place.managed, [job(fits)])
    await until(lambda: large[1].let_in)
    small = engines.submit(place.managed, [job(2)])
    place.decoder.gate.set()
    await large[1].events()
    assert not small[1].let_in

    large[0].withdraw(large[1])
    await finish(*small)

    never = engines.submit(place.managed, [job(fits + 1000)])
    with pytest.raises(NoCacheMemoryError, match="lower max_tokens"):
        await finish(*never)
    await gone(engines)
    assert engines.memory.nbytes(place.managed) == 0


async def test_who_has_gone_is_not_run_on(place: Place) -> None:
    engines = place.engines()
    leaves, stays = (engines.submit(place.managed, [job(5)]) for _ in range(2))
    await leaves[1].events()
    leaves[0].withdraw(leaves[1])

    await finish(*stays)

    assert place.decoder.rows[-1] == 1
    assert len(leaves[1].jobs[0].continuations[0].tokens) < 5


async def test_a_forward_that_fails_ends_all_and_the_next_request_begins_anew(
    place: Place,
) -> None:
    engines = place.engines()
    place.decoder.fails = True
    taken = [engines.submit(place.managed, [job()]) for _ in range(2)]
    for one in taken:
        with pytest.raises(GenerationFailedError, match="log says why"):
            await finish(*one)

    place.decoder.fails = False
    assert len(await finish(*engines.submit(place.managed, [job()]))) == 3


async def test_a_drain_waits_for_requests_and_ends_those_that_are_late(place: Place) -> None:
    engines = place.engines()
    assert await engines.drain(1, lambda: GenerationFailedError("late"))
    early = engines.submit(place.managed, [job()])
    finishing = asyncio.create_task(finish(*early))
    assert await engines.drain(30, lambda: GenerationFailedError("late"))
    assert len(await finishing) == 3

    place.decoder.gate.clear()
    late = engines.submit(place.managed, [job()])
    finishing = asyncio.create_task(finish(*late))
    draining = asyncio.create_task(engines.drain(0, lambda: GenerationFailedError("late")))
    with pytest.raises(GenerationFailedError, match="late"):
        await finishing
    place.decoder.gate.set()
    assert not await draining


async def test_a_model_that_is_unloaded_ends_its_requests(place: Place) -> None:
    engines = place.engines()
    place.decoder.gate.clear()
    taken = engines.submit(place.managed, [job()])
    finishing = asyncio.create_task(finish(*taken))
    await asyncio.sleep(0)

    unloading = asyncio.create_task(place.manager.unload_model("m", drain_timeout=0))
    with pytest.raises(Exception, match="being unloaded"):
        await finishing
    place.decoder.gate.set()
    await unloading
    await gone(engines)
