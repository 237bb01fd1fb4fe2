"""How tokens are chosen, and how many: pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_NO_BIAS: Mapping[int, float] = MappingProxyType({})
_SEEDS = 1 << 63


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits, in this order.

    Attributes:
        logit_bias: Token -> what is added to its logit.
        repetition_penalty: Logits of tokens that were seen, in the prompt too, are divided by it
            where positive and multiplied where negative (CTRL, arXiv 1909.05858).
        frequency_penalty: Taken from a token's logit for each time that it was generated.
        presence_penalty: Taken from the logit of each token that was generated.
        temperature: Divides the logits; 0 takes the best token, whatever follows.
        top_k: Most candidates; 0 for all.
        top_p: Candidates are the best ones that together have this probability.
        min_p: Candidates have at least this share of the best one's probability.
        seed: Makes the draws the same each time; `None` for others each time.
    """

    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature == 0

    @property
    def shapes(self) -> bool:
        """Whether logits are changed for this sequence alone, before the best are chosen."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
        )

    @property
    def choice(self) -> tuple[float, int, float, float]:
        """What sequences must agree in to be drawn together."""
        return (self.temperature, self.top_k, self.top_p, self.min_p)

    def seed_of(self, number: int) -> int | None:
        """Return the seed of one of several answers to the same prompt: each has its own."""
        return None if self.seed is None else (self.seed + number) % _SEEDS


@dataclass(frozen=True)
class Wanted:
    """What is to come back of a prompt.

    Attributes:
        max_tokens: Most tokens of an answer.
        answers: How many answers are made.
        ends: Tokens that end an answer.
        logprobs: How many of the most probable tokens to tell at each place; `None` for not even
            the probability of the token itself.
        prompt_logprobs: Whether to tell them of the prompt's tokens, too.
        totals: Whether the probability of an answer is needed, to choose among several.
    """

    max_tokens: int
    answers: int = 1
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    totals: bool = False

    @property
    def scores(self) -> bool:
        """Whether logarithms of probabilities are needed of what is generated."""
        return self.logprobs is not None or self.totals
