"""What is to be generated, and what becomes of it, as values that threads hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from splitlearn_manager.generation.errors import GenerationError
    from splitlearn_manager.generation.sampling import Sampling, Wanted

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, and how probable it was by the model alone.

    Attributes:
        token: The token.
        logprob: Natural logarithm of its probability, before penalties, biases and temperature;
            `None` where nobody asked.
        top: The most probable tokens with theirs, the best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Continuation:
    """One answer to a prompt, on its way.

    Attributes:
        job: The prompt's.
        number: Which of its answers.
        lane: Its way through the parts, while it has one (`stages.Lane`).
        state: What its tokens depend on, besides the logits (`sampler.Row`).
        tokens: Its tokens so far; the parts have not seen the last one.
        total: Sum of the logarithms of their probabilities, where it is counted.
        unwanted: Whether nobody waits for it any more; set by the event loop.
    """

    job: Job
    number: int
    lane: Any = None
    state: Any = None
    tokens: list[int] = field(default_factory=list)
    total: float = 0.0
    unwanted: bool = False


@dataclass(eq=False)
class Job:
    """A prompt, and what is wanted of it.

    Attributes:
        tokens: The prompt's.
        sampling: How tokens are chosen.
        wanted: What is to come back.
        continuations: Its answers.
        done: Tokens of the prompt that have run.
        lane: The prompt's way through the parts, which its answers begin with.
        told: How probable the prompt's tokens were, but for the first.
        traceparent: The span of the request that it came with, if there is one.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    wanted: Wanted
    continuations: list[Continuation] = field(init=False)
    done: int = 0
    lane: Any = None
    told: list[Scored] = field(default_factory=list)
    traceparent: str | None = None

    def __post_init__(self) -> None:
        """Make its answers."""
        self.continuations = [Continuation(self, number) for number in range(self.wanted.answers)]

    @property
    def length(self) -> int:
        """Positions of the prompt."""
        return len(self.tokens)

    @property
    def left(self) -> int:
        """Those that have not run."""
        return len(self.tokens) - self.done

    @property
    def positions(self) -> int:
        """Most positions of prompt and answer together."""
        return len(self.tokens) + self.wanted.max_tokens

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for any of its answers."""
        return all(one.unwanted for one in self.continuations)


@dataclass(frozen=True, slots=True)
class PromptTold:
    """How probable the tokens of a prompt were, but for the first; comes before its answers."""

    job: Job
    told: list[Scored]


@dataclass(frozen=True, slots=True)
class TokenMade:
    """A token of an answer.

    Attributes:
        continuation: The answer.
        scored: The token.
        finish: Why it was the last one, if it was; `ended` tokens are not part of the text.
    """

    continuation: Continuation
    scored: Scored
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class NothingMade:
    """An answer that was to have no token has none."""

    continuation: Continuation


@dataclass(frozen=True, slots=True)
class Failed:
    """A job has come to nothing; what was told of it holds, and no more comes."""

    job: Job
    error: GenerationError


Event = PromptTold | TokenMade | NothingMade | Failed


def job_of(event: Event) -> Job:
    """Return the job that an event is about."""
    return event.job if isinstance(event, PromptTold | Failed) else event.continuation.job


def ended_by(event: Event) -> list[Continuation]:
    """Return the answers that get no more tokens after an event."""
    if isinstance(event, Failed):
        return event.job.continuations
    if isinstance(event, NothingMade) or (isinstance(event, TokenMade) and event.finish):
        return [event.continuation]
    return []
