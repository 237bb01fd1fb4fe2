"""From the tokens of one answer to its text, piece by piece, up to where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitlearn_manager.generation.detokenizer import Detokenizer
from splitlearn_manager.generation.logprobs import Told
from splitlearn_manager.generation.stopping import StopStrings

if TYPE_CHECKING:
    from splitlearn_manager.generation.jobs import Finish, Job, Scored, TokenMade
    from splitlearn_manager.generation.text import TextModel


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: Its text.
        told: Its tokens, where they are told.
        finish: Why it ends here, if it does.
    """

    text: str
    told: tuple[Told, ...] = ()
    finish: Finish | None = None


@dataclass(eq=False)
class Answer:
    """One answer to a prompt.

    Args:
        model: What tokens mean.
        job: The prompt's.
        stops: Texts at which it ends.
        begins: Its text before its first token: an echo of its prompt.
        tells: Whether its tokens are told.

    Attributes:
        text: All of it so far.
        told: Its tokens, where they are told.
        tokens: How many there are.
        total: Sum of the logarithms of their probabilities, where they are known.
        finish: Why it has ended.
    """

    model: TextModel
    job: Job
    stops: Sequence[str] = ()
    begins: str = ""
    tells: bool = False
    text: str = field(init=False)
    told: list[Told] = field(default_factory=list)
    tokens: int = 0
    total: float = 0.0
    finish: Finish | None = None

    def __post_init__(self) -> None:
        """Begin with the prompt's last tokens, which the first new ones are decoded with."""
        self.text = self.begins
        self._decoded = len(self.begins)
        self._words = Detokenizer(self.model.decode, self.job.tokens)
        self._stops = StopStrings(self.stops)

    @property
    def mean(self) -> float:
        """Mean of the logarithms of its tokens' probabilities."""
        return self.total / max(self.tokens, 1)

    def add(self, made: TokenMade) -> Piece:
        """Return what a token more makes sure of the answer."""
        self.tokens += 1
        self.total += made.scored.logprob or 0.0
        told = (self._tell(made.scored),) if self.tells else ()
        self.finish = made.finish
        text = "" if made.finish == "stop" else self._words.add(made.scored.token)
        if made.finish is not None:
            text += self._words.finish()
        self._decoded += len(text)
        sure = self._stops.feed(text)
        if self._stops.stopped:
            self.finish = "stop"
        elif made.finish is not None:
            sure += self._stops.finish()
        self.text += sure
        self.told += told
        return Piece(sure, told, self.finish)

    def end(self) -> Piece:
        """Return what there is of an answer that was to have no token."""
        self.finish = "length"
        return Piece("", (), self.finish)

    def echo(self, scored: Sequence[Scored] = ()) -> Piece:
        """Return the prompt as the beginning of the answer.

        Args:
            scored: How probable its tokens were, but for the first, where they are told.
        """
        told = tuple(tell_prompt(self.model, self.job.tokens, scored)) if self.tells else ()
        self.told += told
        return Piece(self.begins, told)

    def _tell(self, scored: Scored) -> Told:
        return _told(self.model, scored.token, scored, self._decoded)


def tell_prompt(
    model: TextModel, tokens: Sequence[int], scored: Sequence[Scored]
) -> Sequence[Told]:
    """Return the tokens of a prompt, each with where its text begins in that of the prompt."""
    words = Detokenizer(model.decode)
    told, offset = [], 0
    for token, one in zip(tokens, (None, *scored), strict=True):
        told.append(_told(model, token, one, offset))
        offset += len(words.add(token))
    return told


def _told(model: TextModel, token: int, scored: Scored | None, offset: int) -> Told:
    if scored is None:
        return Told(model.token(token), None, (), offset)
    top = tuple((model.token(other), logprob) for other, logprob in scored.top)
    return Told(model.token(token), scored.logprob, top, offset)
