"""Prompts and the answers to them, a forward at a time.

Everything here runs in the thread of a model, but for what a `Continuation` says of itself: whether
anybody still wants it is set by the event loop, and looked at between forwards.

    a round:  one forward of every answer's next token  ->  pieces of prompts, as there is room

Where the parts can have sequences packed into one row, that is a single forward.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from splitlearn_manager.client.errors import RemoteError
from splitlearn_manager.core.failures import with_frames, without_frames
from splitlearn_manager.generation.errors import (
    GenerationError,
    GenerationFailedError,
    TrunkRefusedError,
    TrunkUnavailableError,
)
from splitlearn_manager.generation.jobs import (
    Continuation,
    Event,
    Failed,
    Finish,
    Job,
    NothingMade,
    PromptTold,
    Scored,
    TokenMade,
)
from splitlearn_manager.generation.sampler import choose, row_of, score
from splitlearn_manager.generation.stages import Chain, Lane, Step, ids_of, logits_of
from splitlearn_manager.generation.turns import take_pieces
from splitlearn_manager.serving.pace import Pace

logger = logging.getLogger(__name__)

LOGITS = 1 << 24
"""Most logits of a piece of a prompt whose tokens are told of: 64 MiB in float32."""


class Decoder:
    """Runs the jobs of one model.

    Args:
        chain: Its parts.
        piece: Most positions of a prompt in one forward, and of all of them in one round.
        pace: What forwards of this model were and took before.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        piece: int,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.chain = chain
        self._piece = piece
        self._clock = clock
        self._pace = Pace(piece) if pace is None else pace
        self._prompts: deque[Job] = deque()
        self._running: list[Continuation] = []
        self._gave_way = False

    @property
    def running(self) -> int:
        """Answers that get tokens now."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._running or self._prompts)

    @property
    def has_prompts(self) -> bool:
        """Whether a prompt is to be run."""
        return bool(self._prompts)

    def take(self, jobs: Sequence[Job]) -> None:
        """Take jobs on."""
        self._prompts.extend(jobs)

    def drop_unwanted(self) -> None:
        """Let go of what nobody waits for."""
        for one in self._running:
            if one.unwanted:
                one.lane = None
        self._running = [one for one in self._running if not one.unwanted]
        for job in self._prompts:
            if job.unwanted:
                job.lane = None
        self._prompts = deque(job for job in self._prompts if not job.unwanted)

    def clear(self) -> None:
        """Let go of everything."""
        for one in self._running:
            one.unwanted = True
        for job in self._prompts:
            for one in job.continuations:
                one.unwanted = True
        self.drop_unwanted()

    def together(self) -> list[Event]:
        """Run one forward for all answers and for pieces of prompts, where parts pack them.

        Answers run without prompts until it is known how long that takes, and prompts without them
        where answers give way.
        """
        self.drop_unwanted()
        gives_way = self._gives_way()
        if self._running and not gives_way and not self._pace.knows_steps:
            return self.step()
        running = [] if gives_way else self._running
        self._gave_way = gives_way
        pieces = self._pieces(beside=bool(running))
        if not (running or pieces):
            return []
        steps = [self._next(one) for one in running]
        begun = [self._piece_step(job, length) for job, length in pieces]
        began = self._clock()
        self.chain.run([*steps, *begun])
        events = self._stepped(running, steps) if running else []
        events += self._prefilled(pieces, begun)
        ended = self._clock()
        positions = sum(length for _, length in pieces)
        self._pace.packed_ran(frozenset(map(id, running)), positions, ended - began, ended)
        return events

    def _gives_way(self) -> bool:
        """Whether answers that have but their first tokens wait for one more forward of prompts.

        Those whose prompts came with theirs, and had no room with them: together they then step
        with all their rows, and each prompt is done sooner than in pieces.
        """
        return (
            not self._gave_way
            and bool(self._running and self._prompts)
            and all(len(one.tokens) == 1 for one in self._running)
            and all(job.length <= self._piece for job in self._prompts)
        )

    # --- Answers ---------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run one forward for all answers; each gets a token."""
        self._gave_way = False
        self.drop_unwanted()
        running = self._running
        if not running:
            return []
        began = self._clock()
        steps = [self._next(one) for one in running]
        self.chain.run(steps)
        events = self._stepped(running, steps)
        ended = self._clock()
        self._pace.steps_ran(frozenset(map(id, running)), ended - began, ended)
        return events

    def _stepped(self, running: Sequence[Continuation], steps: Sequence[Step]) -> list[Event]:
        """Give every answer the token that its step came to."""
        events, going = self._settle(running, steps)
        events += self._choose([one for one, _ in going], [logits_of(step) for _, step in going])
        self._running = [one for one in running if one.lane is not None]
        return events

    def _next(self, one: Continuation) -> Step:
        """Return the step of an answer's last token."""
        lane = one.lane
        if lane is None:
            raise RuntimeError("an answer without caches is not run")
        if lane.forgets:
            one.lane = lane = self.chain.new_lane(one.job.traceparent)
            return Step(lane, ids_of((*one.job.tokens, *one.tokens)))
        return Step(lane, ids_of(one.tokens[-1:]))

    def _settle(
        self, running: Sequence[Continuation], steps: Sequence[Step]
    ) -> tuple[list[Event], list[tuple[Continuation, Step]]]:
        """Count what went well; return what failed, and who goes on."""
        pairs = list(zip(running, steps, strict=True))
        failed: dict[Job, Exception] = {}
        for one, step in pairs:
            if step.error is not None:
                failed[one.job] = step.error
            elif one.lane is not None:
                self.chain.note_length(one.lane, step.new)
        events: list[Event] = [self._fail(job, error) for job, error in failed.items()]
        return events, [pair for pair in pairs if pair[0].lane is not None]

    def _choose(
        self, running: Sequence[Continuation], logits: Sequence[torch.Tensor]
    ) -> list[Event]:
        """Give every answer its next token."""
        if not running:
            return []
        chosen = choose(torch.cat(list(logits)), [row_of(one) for one in running])
        events: list[Event] = []
        for one, scored in zip(running, chosen, strict=True):
            if one.lane is None:
                continue  # another answer to the same prompt has failed
            if scored is None:
                events.append(self._fail(one.job, ArithmeticError("the logits are no numbers")))
            else:
                events.append(self._made(one, scored))
        return events

    def _made(self, one: Continuation, scored: Scored) -> TokenMade:
        """Take down a token."""
        one.tokens.append(scored.token)
        one.total += scored.logprob or 0.0
        wanted = one.job.wanted
        finish: Finish | None = None
        if scored.token in wanted.ends:
            finish = "stop"
        elif len(one.tokens) >= wanted.max_tokens:
            finish = "length"
        if finish is not None:
            one.lane = None
        return TokenMade(one, scored, finish)

    # --- Prompts ---------------------------------------------------------------------------

    def prefill(self) -> list[Event]:
        """Run pieces of prompts; those that are done get the first tokens of their answers."""
        self.drop_unwanted()
        pieces = list(take_pieces(self._prompts, self._piece, self._piece_of))
        began = self._clock()
        steps = [self._piece_step(job, length) for job, length in pieces]
        self.chain.run(steps)
        events = self._prefilled(pieces, steps)
        positions = sum(length for _, length in pieces)
        if positions:
            self._pace.piece_ran(positions, self._clock() - began)
        return events

    def _prefilled(self, pieces: Sequence[tuple[Job, int]], steps: Sequence[Step]) -> list[Event]:
        """Take down what pieces of prompts came to."""
        events: list[Event] = []
        for (job, length), step in zip(pieces, steps, strict=True):
            events += self._ran(job, length, step)
        return events

    def _pieces(self, *, beside: bool) -> list[tuple[Job, int]]:
        """Take the pieces of prompts that go into one packed forward, with answers or alone."""
        room = self._piece
        if beside:
            short = all(job.length <= self._piece for job in self._prompts)
            room = self._pace.room(self._clock(), short=short, beside=True)
        return list(take_pieces(self._prompts, room, self._most_of, cut=True))

    def _most_of(self, job: Job) -> int:
        """Return how many positions of a prompt one forward may have, for its logits."""
        return max(1, LOGITS // self.chain.vocabulary) if job.wanted.prompt_logprobs else job.left

    def _piece_of(self, job: Job) -> int:
        """Return how many positions of a prompt may run now."""
        if not self.chain.chunks:
            return job.left
        short = sum(other.length <= self._piece for other in self._prompts)
        if self._running:
            length = self._pace.piece(job.length, job.left, 1, short, self._clock())
        else:
            length = self._piece
        return min(length, self._most_of(job))

    def _piece_step(self, job: Job, length: int) -> Step:
        if job.lane is None:
            job.lane = self.chain.new_lane(job.traceparent)
        tokens = job.tokens[job.done : job.done + length]
        return Step(job.lane, ids_of(tokens), keep=0 if job.wanted.prompt_logprobs else 1)

    def _ran(self, job: Job, length: int, step: Step) -> list[Event]:
        """Take down that a piece of a prompt has run."""
        if step.error is not None or job.lane is None:
            if job in self._prompts:
                self._prompts.remove(job)
            return [self._fail(job, step.error or RuntimeError("a prompt has lost its caches"))]
        self.chain.note_length(job.lane, length)
        logits = logits_of(step)
        if job.wanted.prompt_logprobs:
            follow = job.tokens[job.done + 1 : job.done + 1 + length]
            job.told += score(logits[: len(follow)], follow, job.wanted.logprobs or 0)
        job.done += length
        return [] if job.left else self._begin(job, logits[-1:])

    def _begin(self, job: Job, logits: torch.Tensor) -> list[Event]:
        """Begin the answers to a prompt, given the logits [1, vocabulary] of its last token."""
        events: list[Event] = [PromptTold(job, job.told)] if job.wanted.prompt_logprobs else []
        answers = [one for one in job.continuations if not one.unwanted]
        if not job.wanted.max_tokens:
            job.lane = None
            return [*events, *map(NothingMade, answers)]
        try:
            for one in answers[1:]:
                one.lane = self._copy(job)
        except Exception as error:  # noqa: BLE001 - it is the answer to this job alone
            return [*events, self._fail(job, error)]
        for one in answers[:1]:
            one.lane = job.lane
        job.lane = None
        events += self._choose(answers, [logits] * len(answers))
        self._running += [one for one in answers if one.lane is not None]
        return events

    def _copy(self, job: Job) -> Lane:
        if job.lane is None:
            raise RuntimeError("a prompt has lost its caches")
        return self.chain.copy(job.lane)

    # --- What goes wrong -------------------------------------------------------------------

    def _fail(self, job: Job, error: Exception) -> Failed:
        """Let go of a job, and say why."""
        job.lane = None
        for one in job.continuations:
            one.lane = None
        return Failed(job, _presentable(error))


def _presentable(error: Exception) -> GenerationError:
    """Return what a client is told of an error, which keeps no frames and so no caches."""
    if isinstance(error, GenerationError):
        return error
    if isinstance(error, ConnectionError):
        found: GenerationError = TrunkUnavailableError(str(error))
    elif isinstance(error, RemoteError):
        found = TrunkRefusedError(str(error))
    else:
        logger.error("a forward of a request for text failed\n%s", with_frames(error))
        found = GenerationFailedError("the forward failed; the server's log says why")
    found.__cause__ = without_frames(error)
    return found
