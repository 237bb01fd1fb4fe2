"""Whose turn it is: the steps of all sessions of one model, a forward at a time.

Steps that can share a forward run together; whoever comes while it runs is in the next (continuous
batching).  Long steps (prompts) run in pieces.  Where the part can have sequences packed into one
row, they are in the same forward as steps:

    a round:  one forward of all steps that wait, and of pieces of prompts

(where that would cost steps accuracy, pieces have a forward of their own in each round).  Elsewhere
they run alone, and between two pieces every step that waits has its turn, so that none waits longer
than one piece:

    a round:  one forward of all steps that wait together  ->  one piece of one prompt

After a forward its clients need a moment before they send their next steps.  The batcher waits for
them, but for a small share of what a forward takes.  How long, and how much of a prompt is a piece,
is for `pace` to say.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from splitlearn_core.machine import return_freed_memory
from splitlearn_manager.errors import ManagerError
from splitlearn_manager.serving.pace import SHORTEST_PIECE, Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from splitlearn_core.joined_cache import Joinable
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.serving.forward import Outcome, Work
    from splitlearn_manager.serving.step import Part, State, Step

LONGEST_TOGETHER = 16
"""Positions up to which a step shares a forward: a token, or a few that are checked at once."""

_UNTIDY = 512
_VERY_UNTIDY = 8 * _UNTIDY
"""Positions of prompts after which memory that their forwards freed goes back to the system: where
no prompt waits that could use it again, and where one does.

Their tensors are of many sizes, and lie between what sessions keep: left alone, the allocator holds
on to some 0.9 MB more with every prompt of 2,000.  To give it back takes 1 to 2 ms, and then the
next forwards find their memory page by page again.
"""


@dataclass(frozen=True)
class BatchLimits:
    """How far sessions share forwards.

    Attributes:
        rows: Most rows of one forward, but for one prompt, which may come on top; 1 runs every step
            alone and in one piece, which makes it equal to the bit to the same forward anywhere
            else.
        piece: Most positions of a prompt in one forward.
    """

    rows: int = 1
    piece: int = 512


@dataclass(frozen=True, slots=True)
class Turn:
    """When a step was run, by the batcher's clock.

    Attributes:
        queued: When it came.
        began: When it had its turn, the first one of a prompt.
        ended: When its answer was there.
        together: How many steps shared its forward, the first one of a prompt.
    """

    queued: float
    began: float
    ended: float
    together: int


class ForwardMetrics(Protocol):
    """What the batcher reports."""

    def forward(self, model_id: str, rows: int, seconds: float) -> None:
        """Count a forward: its rows, and how long it took."""
        ...

    def step_queued(self, model_id: str, seconds: float) -> None:
        """Note how long a step waited for its turn."""
        ...


@dataclass(eq=False, slots=True)
class _Job:
    """A step, and who waits for it."""

    work: Work
    answer: asyncio.Future[Outcome]
    queued: float
    begun: bool = False
    began: float = 0.0
    together: int = 1

    @property
    def rows(self) -> int:
        return self.work.step.batch

    @property
    def new(self) -> int:
        return self.work.step.new

    @property
    def padded(self) -> bool:
        """Whether it has, or its session had, a mask."""
        return self.work.step.mask is not None or self.work.state.mask is not None

    def drop(self, answer: asyncio.Future[Outcome]) -> None:
        """Tell the model's thread that nobody waits, if so."""
        self.work.dropped = answer.cancelled()


class Batcher:
    """Runs the steps of one load of a model, in its thread, one forward after the other.

    `start` before the first step, and `stop` after the last: between them one task has all jobs.
    A caller that is cancelled goes alone: its step is not run, if its turn has not come.

    Args:
        managed: The model.
        limits: How far its sessions share forwards.
        joinable: What they can share at all.
        metrics: Who counts.
        clock: Monotonic seconds.
        on_turn: Called with the turn of each step that was answered, in its caller's context.
        pace: What is known of how long its forwards take.

    Attributes:
        sessions: How many the model has now.
    """

    def __init__(
        self,
        managed: AsyncManagedModel,
        limits: BatchLimits,
        joinable: Joinable,
        metrics: ForwardMetrics,
        clock: Callable[[], float] = time.monotonic,
        on_turn: Callable[[Turn], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.sessions = 0
        self._managed = managed
        self._limits = limits
        self._joinable = joinable
        self._packs = joinable.packed and limits.rows > 1
        self._metrics = metrics
        self._clock = clock
        self._on_turn = on_turn
        self._steps: deque[_Job] = deque()
        self._prompts: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._pace = pace or Pace(limits.piece)
        self._untidy = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve."""
        name = f"batcher-{self._managed.model_id}"
        self._task = asyncio.create_task(self._serve(), name=name)

    def stop(self) -> asyncio.Task[None]:
        """Serve no more; steps that wait are cancelled.  Returns the task, which is to be awaited.

        Raises:
            RuntimeError: It was not started.
        """
        if self._task is None:
            raise RuntimeError("a batcher is stopped after it was started")
        self._task.cancel()
        for job in (*self._steps, *self._prompts):
            job.answer.cancel()
        return self._task

    def forget(self, state: State) -> None:
        """Expect no more steps of a session, which has ended."""
        self._pace.forget(id(state))

    @property
    def waiting(self) -> int:
        """Steps that wait for their turn, or for that of their next piece."""
        return len(self._steps) + len(self._prompts)

    async def run(self, state: State, step: Step) -> Outcome:
        """Run a step when its turn comes.

        Raises:
            ManagerError: The model was unloaded.
            Exception: Whatever the part raised.
        """
        job = _Job(_work(state, step), asyncio.get_running_loop().create_future(), self._clock())
        job.answer.add_done_callback(job.drop)
        (self._steps if self._shares(state, step) else self._prompts).append(job)
        self._arrived.set()
        outcome = await job.answer
        if self._on_turn is not None:
            self._on_turn(Turn(job.queued, job.began, self._clock(), job.together))
        return outcome

    def _shares(self, state: State, step: Step) -> bool:
        """Whether a step may be in one forward with others."""
        padded = step.mask is not None or state.mask is not None
        return (
            self._joinable.steps
            and self._limits.rows > 1
            and state.length > 0
            and (step.new == 1 or (step.new <= LONGEST_TOGETHER and self._joinable.chunks))
            and (step.positions is not None or not padded)
        )

    # --- Turns -----------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Take turns, for ever."""
        while True:
            await self._gather()
            await self._round()

    async def _round(self) -> None:
        """Run the steps that wait, and a piece of a prompt.

        By itself, so that nothing of it is kept while the next round is waited for.
        """
        jobs = self._next_steps()
        pieces = self._next_pieces(jobs) if not jobs or self._mixes(jobs[0]) else []
        if pieces or (jobs and self._packed(jobs[0])):
            await self._run_packed(jobs, pieces)
        elif jobs:
            await self._run_steps(jobs)
        apart = jobs and not pieces and not self._mixes(jobs[0])
        if apart and (pieces := self._next_pieces([])):
            await self._run_packed([], pieces)
        if not (self._prompts and self._packed(self._prompts[0])) and (job := self._next_prompt()):
            await self._run_prompt(job)

    async def _gather(self) -> None:
        """Wait for a job, and a moment for those that are expected."""
        while not (self._steps or self._prompts):
            await self._arrival()
        if self._packs and not self._steps:
            await self._gather_prompts()
        while len(self._steps) < self._expected() and not self._runs_at_once():
            if not await self._arrives_within(self._pace.patience(self._clock())):
                return

    def _expected(self) -> int:
        """Return how many steps are to be waited for.

        Prompts that wait run at once where no step does, rather than wait for those who have their
        first token and will step.
        """
        newcomers = bool(self._steps) or not self._prompts
        expected = self._pace.expected(newcomers=newcomers)
        return min(expected, self._limits.rows, self.sessions)

    async def _gather_prompts(self) -> None:
        """Wait a moment for prompts that come together: in one forward they cost less."""
        while not self._steps and len(self._prompts) < self.sessions:
            positions = sum(job.new * job.rows for job in self._prompts if self._packed(job))
            if not positions or positions >= self._limits.piece:
                return
            if not await self._arrives_within(self._pace.company(positions)):
                return

    def _runs_at_once(self) -> bool:
        """Whether there is a prompt for whose piece steps need not be there."""
        return bool(self._prompts) and not self._packed(self._prompts[0])

    async def _arrives_within(self, seconds: float) -> bool:
        """Wait so long for the next job; return whether one came."""
        if seconds <= 0:
            return False
        try:
            async with asyncio.timeout(seconds):
                await self._arrival()
        except TimeoutError:
            return False
        return True

    async def _arrival(self) -> None:
        """Wait for the next job."""
        self._arrived.clear()
        await self._arrived.wait()

    def _next_steps(self) -> list[_Job]:
        """Take the steps that go with the one that waited longest."""
        jobs: list[_Job] = []
        others: deque[_Job] = deque()
        rows = 0
        for job in self._steps:
            if job.answer.done():
                continue
            fits = not jobs or rows + job.rows <= self._limits.rows
            if fits and (not jobs or self._alike(job, jobs[0])):
                jobs.append(job)
                rows += job.rows
            else:
                others.append(job)
        self._steps = others
        return jobs

    def _packed(self, job: _Job) -> bool:
        """Whether a job's positions are packed with those of others."""
        return self._packs and not job.padded

    def _mixes(self, job: _Job) -> bool:
        """Whether pieces of prompts go into the forward of a step.

        As long as it isn't known what steps take, they wait for one forward of steps alone.
        """
        return self._packed(job) and self._pace.knows_steps

    def _alike(self, job: _Job, first: _Job) -> bool:
        """Whether two steps can be in one forward."""
        if self._packed(first):
            return self._packed(job)
        return job.new == first.new and not self._packed(job)

    def _next_pieces(self, jobs: Sequence[_Job]) -> list[tuple[_Job, int]]:
        """Take the prompts that have a piece in the forward of these steps, and how long it is.

        The first one that waits always has: there may be as many steps as rows.
        """
        self._prompts = deque(job for job in self._prompts if not job.answer.done())
        if not self._prompts:
            return []
        short = all(job.new <= self._limits.piece for job in self._prompts)
        room = self._pace.room(self._clock(), short=short, beside=bool(jobs))
        rows = self._limits.rows - sum(job.rows for job in jobs)
        taken: list[tuple[_Job, int]] = []
        while self._prompts and self._packed(self._prompts[0]):
            job = self._prompts[0]
            if taken and job.rows > min(rows, room):
                break
            self._prompts.popleft()
            # A prompt without others runs with all its rows, each a whole piece long.
            alone = not (jobs or taken) and room == self._limits.piece
            most = room if alone else max(room // job.rows, SHORTEST_PIECE)
            new = min(job.new - job.work.done, most)
            taken.append((job, new))
            room -= new * job.rows
            rows -= job.rows
        return taken

    def _next_prompt(self) -> _Job | None:
        """Take the prompt whose turn it is."""
        while self._prompts:
            job = self._prompts.popleft()
            if not job.answer.done():
                return job
        return None

    def _piece(self, job: _Job) -> int:
        """Return how many positions of a prompt to run now."""
        left = job.new - job.work.done
        if not self._joinable.chunks or self._limits.rows == 1:
            return left
        short = sum(other.new <= self._limits.piece for other in (job, *self._prompts))
        return self._pace.piece(job.new, left, job.rows, short, self._clock())

    # --- Forwards --------------------------------------------------------------------------

    async def _run_steps(self, jobs: list[_Job]) -> None:
        """Run steps together, and answer each."""
        began = self._begin(jobs)
        works = [job.work for job in jobs]
        masked = self._joinable.mask
        outcomes: list[Outcome | Exception]
        try:
            outcomes = await self._managed.run(_together, self._managed, works, masked=masked)
        except Exception as error:  # noqa: BLE001 - it is the answer to all of them
            outcomes = [error for _ in jobs]
        ended = self._clock()
        self._pace.steps_ran(frozenset(id(work.state) for work in works), ended - began, ended)
        rows = sum(job.rows for job in jobs if not job.work.dropped)
        self._metrics.forward(self._managed.model_id, rows, ended - began)
        for job, outcome in zip(jobs, outcomes, strict=True):
            _settle(job, outcome)

    async def _run_packed(self, jobs: Sequence[_Job], pieces: Sequence[tuple[_Job, int]]) -> None:
        """Run steps and pieces of prompts together; answer those that are done."""
        together = [*((job, job.new) for job in jobs), *pieces]
        began = self._begin([job for job, _ in together])
        works = [(job.work, new) for job, new in together]
        outcomes: list[Outcome | Exception | None]
        try:
            outcomes = await self._managed.run(_packed, self._managed, works)
        except Exception as error:  # noqa: BLE001 - it is the answer to all of them
            outcomes = [error for _ in together]
        ended = self._clock()
        ran = [not isinstance(outcome, Exception) for outcome in outcomes]
        stepping = frozenset(
            id(job.work.state) for job, well in zip(jobs, ran, strict=False) if well
        )
        begun = list(zip(pieces, outcomes[len(jobs) :], ran[len(jobs) :], strict=True))
        positions = sum(new * job.rows for (job, new), _, well in begun if well)
        self._pace.packed_ran(stepping, positions, ended - began, ended)
        first = (job for (job, _), outcome, well in begun if well and outcome is not None)
        self._prompts_ended(first, ended - began, ended)
        rows = sum(job.rows for job, _ in together if not job.work.dropped)
        self._metrics.forward(self._managed.model_id, rows, ended - began)
        answers = [(job, outcome) for (job, _), outcome in zip(together, outcomes, strict=True)]
        for job, outcome in answers[: len(jobs)]:
            _settle(job, outcome)
        self._prompts.extend(job for job, outcome in answers if outcome is None)
        await self._tidy([job for job, outcome in answers[len(jobs) :] if outcome is not None])
        for job, outcome in answers[len(jobs) :]:
            _settle(job, outcome)

    async def _run_prompt(self, job: _Job) -> None:
        """Run a piece of a prompt; answer it, or let it wait for its next turn."""
        began = self._begin([job])
        most = self._piece(job)
        outcome: Outcome | Exception | None
        try:
            outcome = await self._managed.run(_piece, self._managed, job.work, most)
        except Exception as error:  # noqa: BLE001 - it is the answer to this step
            outcome = error
        seconds = self._clock() - began
        if not isinstance(outcome, Exception):
            self._pace.piece_ran(most * job.rows, seconds)
            self._prompts_ended([job] if outcome is not None else [], seconds, began + seconds)
        self._metrics.forward(self._managed.model_id, job.rows, seconds)
        if outcome is None:
            self._prompts.append(job)
            return
        await self._tidy([job])
        _settle(job, outcome)

    def _prompts_ended(self, jobs: Iterable[_Job], seconds: float, ended: float) -> None:
        """Expect the first steps of those whose prompts ended, where they share forwards."""
        if self._joinable.steps and self._limits.rows > 1:
            sharing = frozenset(id(job.work.state) for job in jobs if not job.padded)
            self._pace.prompts_ended(sharing, seconds, ended)

    async def _tidy(self, prompts: Sequence[_Job]) -> None:
        """Give back what the forwards of prompts have freed, once there were enough of them."""
        self._untidy += sum(job.new * job.rows for job in prompts)
        if not prompts or self._untidy < (_VERY_UNTIDY if self._prompts else _UNTIDY):
            return
        self._untidy = 0
        for job in prompts:
            job.work.pieces.clear()  # they are in the answer
        with suppress(ManagerError):  # the model is gone, and its memory with it
            await self._managed.run(return_freed_memory)

    def _begin(self, jobs: Sequence[_Job]) -> float:
        """Note that jobs have their turn, and return when."""
        now = self._clock()
        for job in jobs:
            if not job.begun:
                job.begun, job.began, job.together = True, now, len(jobs)
                self._metrics.step_queued(self._managed.model_id, now - job.queued)
        return now


def _settle(job: _Job, outcome: Outcome | Exception | None) -> None:
    """Give a job its answer, if it is done and anybody still waits for it."""
    if outcome is None or job.answer.done():
        return
    if isinstance(outcome, Exception):
        job.answer.set_exception(outcome)
    else:
        job.answer.set_result(outcome)


# What runs in the model's thread imports torch, which nobody has to wait for before.


def _work(state: State, step: Step) -> Work:
    from splitlearn_manager.serving.forward import Work  # noqa: PLC0415 - imports torch

    return Work(state, step, state.cache)


def _together(
    managed: AsyncManagedModel, works: list[Work], *, masked: bool
) -> list[Outcome | Exception]:
    from splitlearn_manager.serving.forward import run_together  # noqa: PLC0415 - imports torch

    part: Part = managed.model
    return run_together(part, works, masked=masked)


def _packed(
    managed: AsyncManagedModel, pieces: list[tuple[Work, int]]
) -> list[Outcome | Exception | None]:
    from splitlearn_manager.serving.forward import run_packed  # noqa: PLC0415 - imports torch

    part: Part = managed.model
    return run_packed(part, pieces)


def _piece(managed: AsyncManagedModel, work: Work, most: int) -> Outcome | None:
    from splitlearn_manager.serving.forward import run_piece  # noqa: PLC0415 - imports torch

    part: Part = managed.model
    return run_piece(part, work, most)
