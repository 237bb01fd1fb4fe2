"""Requests for text of one model, decoded together: asyncio's side of it.

One task for each load of a model has its requests.  It lets them in when there is room for their
answers and memory for their caches, in the order in which they came, and runs the decoder's
forwards in the model's thread, one after the other.  Who comes meanwhile is let in between two
forwards, and who has gone leaves there.

What a request may come to hold here is reserved before it is let in, from the same ledger as the
models; one that would not fit even alone is refused with the figures.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from splitlearn_manager.core.failures import with_frames
from splitlearn_manager.errors import ManagerError
from splitlearn_manager.generation.errors import (
    GenerationFailedError,
    NoCacheMemoryError,
    QueueFullError,
)
from splitlearn_manager.generation.jobs import Failed, TokenMade, ended_by, job_of
from splitlearn_manager.serving.cache_memory import CacheMemory, bytes_for
from splitlearn_manager.serving.errors import NoMemoryError
from splitlearn_manager.serving.pace import Pace
from splitlearn_manager.trace_context import TRACEPARENT, trace_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.lease import Hold
    from splitlearn_manager.core.resources import ResourceManager
    from splitlearn_manager.generation.decoder import Decoder
    from splitlearn_manager.generation.jobs import Continuation, Event, Job

logger = logging.getLogger(__name__)

FAREWELL = 1.0
"""Seconds for requests that are ended to tell their clients."""


@dataclass(frozen=True)
class EngineLimits:
    """How much one model generates at once.

    Attributes:
        rows: Most answers that get tokens at once.
        piece: Most positions of prompts in a forward of answers, or between two.
        waiting: Most requests that wait to be let in.
    """

    rows: int = 64
    piece: int = 512
    waiting: int = 64


class GenerationMetrics(Protocol):
    """What the engine reports."""

    def generation_queued(self, model_id: str, seconds: float) -> None:
        """Note how long a prompt waited to be let in."""
        ...

    def generation_first_token(self, model_id: str, seconds: float) -> None:
        """Note when a request had its first token."""
        ...

    def generation_forward(self, model_id: str, rows: int, seconds: float) -> None:
        """Count a forward of answers."""
        ...

    def generation_tokens(self, model_id: str, kind: str, count: int) -> None:
        """Count tokens: `prompt`, or `generated`."""
        ...


class Ticket:
    """A request that was taken on: what is told of it comes here.

    Args:
        jobs: Its prompts.
        now: When it came.

    Attributes:
        came: When it came.
        let_in: Whether one of its prompts was let in.
        began: Whether it had a token.
    """

    def __init__(self, jobs: Sequence[Job], now: float) -> None:
        self.jobs = tuple(jobs)
        self.came = now
        self.let_in = False
        self.began = False
        self._events: list[Event] = []
        self._error: ManagerError | None = None
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Tell of something."""
        self._events.append(event)
        self._arrived.set()

    def fail(self, error: ManagerError) -> None:
        """Tell that no more will come, and why; the first reason holds."""
        if self._error is None:
            self._error = error
        self._arrived.set()

    async def events(self) -> list[Event]:
        """Wait for something, and return all there is.

        Raises:
            ManagerError: No more will come.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        events, self._events = self._events, []
        return events


class Engine:
    """Generates for the requests of one load of a model.

    Args:
        managed: The model; held until nothing is left to do.
        memory: Where memory for caches is reserved.
        limits: How much at once.
        metrics: Who counts.
        pace: What the model's forwards were and took before; the decoder keeps it.
        on_end: Called when there is nothing left to do: no more may be submitted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        managed: AsyncManagedModel,
        memory: CacheMemory,
        limits: EngineLimits,
        metrics: GenerationMetrics,
        pace: Pace,
        on_end: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._managed = managed
        self._memory = memory
        self._limits = limits
        self._metrics = metrics
        self._pace = pace
        self._on_end = on_end
        self._clock = clock
        self._tickets: set[Ticket] = set()
        self._owner: dict[Job, Ticket] = {}
        self._waiting: deque[Job] = deque()
        self._admitted: dict[Job, int] = {}
        self._decoder: Decoder | None = None
        self._changed = asyncio.Event()
        self._hold: Hold = managed.hold(self.fail)
        self._task = asyncio.create_task(self._serve(), name=f"generation-{managed.model_id}")

    # --- Requests --------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Prompts whose answers are being made, or that are being run."""
        return len(self._admitted)

    @property
    def waiting(self) -> int:
        """Prompts that wait to be let in."""
        return len(self._waiting)

    @property
    def requests(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Take a request on; `withdraw` it in the end, however it ends.

        Raises:
            QueueFullError: As many wait as may.
        """
        queued = sum(not ticket.let_in for ticket in self._tickets)
        if queued >= self._limits.waiting:
            raise QueueFullError(
                f"{queued} requests of model {self._managed.model_id!r} wait already, which is all"
                " that may (server.max_queue_size); try again"
            )
        ticket = Ticket(jobs, self._clock())
        for job in jobs:
            job.traceparent = trace_headers().get(TRACEPARENT)
        self._tickets.add(ticket)
        self._owner.update(dict.fromkeys(jobs, ticket))
        self._waiting.extend(jobs)
        self._changed.set()
        return ticket

    def stop(self, continuation: Continuation) -> None:
        """End an answer here: it gets no more tokens."""
        continuation.unwanted = True

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a request; what is left of it ends before the next forward."""
        for job in ticket.jobs:
            self._owner.pop(job, None)
            for one in job.continuations:
                one.unwanted = True
        self._tickets.discard(ticket)
        self._changed.set()

    def fail(self, error: ManagerError) -> None:
        """End every request, saying why."""
        for ticket in self._tickets:
            ticket.fail(error)

    # --- Its task --------------------------------------------------------------------------

    async def ended(self) -> None:
        """Wait until there is nothing left to do."""
        await asyncio.wait({self._task})

    def cancel(self) -> asyncio.Task[None]:
        """End it, whatever is left to do; returns what is to be awaited."""
        self._task.cancel()
        return self._task

    async def _serve(self) -> None:
        """Generate as long as there is somebody to generate for."""
        try:
            while self._tickets or self._admitted:
                await self._wait()
                await self._round()
        finally:
            self._end()

    def _end(self) -> None:
        """Give back what is held."""
        self._on_end()
        for nbytes in self._admitted.values():
            self._memory.give_back(self._managed, nbytes)
        self._admitted.clear()
        self._decoder = None
        self._hold.release()

    async def _wait(self) -> None:
        """Wait until there is something to do, and a moment for prompts that come together."""
        while self._tickets and not (self._waiting or self._admitted):
            self._changed.clear()
            await self._changed.wait()
        known = 0
        while not self._admitted and (now := await self._more_than(known)):
            known = now

    async def _more_than(self, known: int) -> int:
        """Return how many prompts wait, after a moment for another; 0 if they are no more than so.

        In one forward they cost less.
        """
        lengths = [job.length for job in self._waiting if not job.unwanted]
        seconds = self._pace.company(sum(lengths))
        if len(lengths) <= known or seconds <= 0 or sum(lengths) >= self._limits.piece:
            return 0
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        return len(lengths)

    async def _round(self) -> None:
        """Let in who can be, and run what there is to run."""
        gone = [job for job in self._admitted if job.unwanted]
        try:
            decoder = self._decoder
            if decoder is None:
                decoder = self._decoder = await self._managed.run(
                    _decoder, self._managed, self._limits, self._pace
                )
            self._admit(decoder)
            await self._run(decoder)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - it is the answer to all of them
            await self._give_up(error)
            gone = list(self._admitted)
        for job in gone:
            self._memory.give_back(self._managed, self._admitted.pop(job, 0))

    async def _run(self, decoder: Decoder) -> None:
        """Run a forward of all answers, and pieces of prompts, in it or after it."""
        mixes = decoder.has_prompts and decoder.chain.mixes
        if decoder.running or mixes:
            began = self._clock()
            events = await self._managed.run(decoder.together if mixes else decoder.step)
            made = self._tell(events) - (_first_tokens(events) if mixes else 0)
            if made:
                seconds = self._clock() - began
                self._metrics.generation_forward(self._managed.model_id, made, seconds)
        if decoder.has_prompts and not mixes:
            self._tell(await self._managed.run(decoder.prefill))

    async def _give_up(self, error: Exception) -> None:
        """End everything that is under way, which a forward has left no one knows how."""
        if not isinstance(error, ManagerError):
            model_id = self._managed.model_id
            logger.error("generating with model %s failed\n%s", model_id, with_frames(error))
            error = GenerationFailedError("generating failed; the server's log says why")
        self._waiting.clear()
        self.fail(error)
        for job in self._admitted:
            for one in job.continuations:
                one.unwanted = True
        if self._decoder is not None:
            with suppress(Exception):
                await self._managed.run(self._decoder.clear)

    def _admit(self, decoder: Decoder) -> None:
        """Let prompts in, in their order, as far as there is room."""
        jobs: list[Job] = []
        rows = sum(job.wanted.answers for job in self._admitted)
        while self._waiting:
            job = self._waiting[0]
            if not job.unwanted:
                rows += job.wanted.answers
                if rows > self._limits.rows and self._admitted:
                    break
                nbytes = self._reserve(decoder, job)
                if nbytes is None and self._admitted:
                    break
                if nbytes is not None:
                    self._admitted[job] = nbytes
                    jobs.append(job)
                    self._note_begin(job)
            self._waiting.popleft()
        decoder.take(jobs)

    def _reserve(self, decoder: Decoder, job: Job) -> int | None:
        """Reserve what a job's caches may come to take; `None` where that does not fit now.

        Where nothing else is held that would be given back, the job fails.
        """
        each = sum(bytes_for(part, 1, job.positions) for part in decoder.chain.bytes_per_position)
        nbytes = each * job.wanted.answers
        try:
            self._memory.grow(self._managed, nbytes)
        except NoMemoryError as error:
            if not self._admitted:
                found = NoCacheMemoryError(f"{error}; ask for fewer answers, or a lower max_tokens")
                self._tell([Failed(job, found)])
            return None
        return nbytes

    def _note_begin(self, job: Job) -> None:
        ticket = self._owner.get(job)
        model_id = self._managed.model_id
        if ticket is not None:
            ticket.let_in = True
            self._metrics.generation_queued(model_id, self._clock() - ticket.came)
        self._metrics.generation_tokens(model_id, "prompt", job.length)

    def _tell(self, events: Iterable[Event]) -> int:
        """Tell each request what has become of it; return how many tokens there are."""
        made = 0
        for event in events:
            job = job_of(event)
            for one in ended_by(event):
                one.unwanted = True
            made += isinstance(event, TokenMade)
            ticket = self._owner.get(job)
            if ticket is not None:
                self._first(ticket, event)
                ticket.put(event)
        if made:
            self._metrics.generation_tokens(self._managed.model_id, "generated", made)
        return made

    def _first(self, ticket: Ticket, event: Event) -> None:
        """Note the first token of a request."""
        if not ticket.began and isinstance(event, TokenMade):
            ticket.began = True
            seconds = self._clock() - ticket.came
            self._metrics.generation_first_token(self._managed.model_id, seconds)


class Engines:
    """The engines of all loads that generate, one for each.

    Args:
        resources: The ledger of memory.
        limits: How much each model generates at once.
        metrics: Who counts.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        resources: ResourceManager,
        limits: EngineLimits,
        metrics: GenerationMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = CacheMemory(resources)
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._running: dict[AsyncManagedModel, Engine] = {}
        self._paces: WeakKeyDictionary[AsyncManagedModel, Pace] = WeakKeyDictionary()

    def submit(self, managed: AsyncManagedModel, jobs: Sequence[Job]) -> tuple[Engine, Ticket]:
        """Take a request on; whoever does is to `withdraw` the ticket in the end.

        Raises:
            QueueFullError: As many wait as may.
            ModelUnloadingError: The model is gone.
        """
        engine = self._running.get(managed)
        if engine is None:
            engine = Engine(
                managed,
                self.memory,
                self._limits,
                self._metrics,
                self._pace_of(managed),
                partial(self._running.pop, managed, None),
                self._clock,
            )
            self._running[managed] = engine
        return engine, engine.submit(jobs)

    def _pace_of(self, managed: AsyncManagedModel) -> Pace:
        """Return what a load's forwards took, which is kept from one engine to the next."""
        pace = self._paces.setdefault(managed, Pace(self._limits.piece))
        pace.begin_anew()
        return pace

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return for each model how many prompts are being answered, and wait; in any thread."""
        found: Counter[tuple[str, int]] = Counter()
        engines = tuple(self._running.items())
        for managed, engine in engines:
            found[managed.model_id, 0] += engine.running
            found[managed.model_id, 1] += engine.waiting
        return {
            managed.model_id: (found[managed.model_id, 0], found[managed.model_id, 1])
            for managed, _ in engines
        }

    async def drain(self, seconds: float, error: Callable[[], ManagerError]) -> bool:
        """Wait until no request is left; end those that are at the end of the time.

        Args:
            seconds: How long to wait.
            error: Returns what they are told then.

        Returns:
            Whether all have ended by themselves.
        """
        engines = list(self._running.values())
        if not engines:
            return True
        waits = [asyncio.ensure_future(engine.ended()) for engine in engines]
        _, late = await asyncio.wait(waits, timeout=seconds)
        for engine in engines:
            engine.fail(error())
        if late:
            await asyncio.wait(late, timeout=FAREWELL)
        for wait in late:
            wait.cancel()
        return not late

    async def close(self) -> None:
        """End all engines, whatever is left to do."""
        tasks = [engine.cancel() for engine in tuple(self._running.values())]
        await asyncio.gather(*tasks, return_exceptions=True)


def _first_tokens(events: Iterable[Event]) -> int:
    """Return how many prompts have their first token, which no answer's step has made."""
    made = (event.continuation for event in events if isinstance(event, TokenMade))
    return sum(len(one.tokens) == 1 for one in made)


# What runs in the model's thread imports torch, which nobody has to wait for before.


def _decoder(managed: AsyncManagedModel, limits: EngineLimits, pace: Pace) -> Decoder:
    from splitlearn_manager.generation.decoder import Decoder  # noqa: PLC0415 - imports torch
    from splitlearn_manager.generation.stages import Chain  # noqa: PLC0415 - imports torch

    return Decoder(Chain.of(managed.model), piece=limits.piece, pace=pace)
