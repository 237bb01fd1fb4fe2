"""What models are asked so that they can be compared: seeded inputs, and results by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from splitlearn_core.errors import SplitLearnError

LOGITS = "logits"
HIDDEN = "hidden states"
CACHED = "cached decode"
PADDED = "padded batch"
GENERATE = "greedy generate"
GRADIENTS = "gradients"

CHECKS = (LOGITS, HIDDEN, CACHED, PADDED, GENERATE, GRADIENTS)

# A series with a cache: a prefill of all but three tokens, then one, then two.
_AFTER_PREFILL = (1, 2)

Named = dict[str, torch.Tensor]
"""What a tensor is -> the tensor, on the CPU."""


@dataclass
class Answers:
    """What somebody made of a trial.

    Attributes:
        results: Check -> its tensors.  Equal models have equal ones.
        failures: Check -> why there are none.
    """

    results: dict[str, Named] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def trying(self, check: str) -> Iterator[None]:
        """Note that a check failed, if the block raises what a model's forward may raise."""
        try:
            yield
        except (SplitLearnError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            message = str(error).partition("\n")[0]
            self.failures[check] = f"{type(error).__name__}: {message}"


@dataclass(frozen=True)
class Step:
    """One forward of a check.

    Attributes:
        name: What it is, for messages.
        ids: int64 [batch, new].
        mask: int64 [batch, past + new], or `None` where nothing is padded.
        real: bool [batch, new]: the positions whose results count.
    """

    name: str
    ids: torch.Tensor
    mask: torch.Tensor | None
    real: torch.Tensor


@dataclass(frozen=True)
class Trial:
    """Seeded inputs.

    Attributes:
        ids: int64 [batch, length].
        mask: int64 [batch, length], 0 for padding: row n has n of it on the left.
        new_tokens: How many to generate.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    new_tokens: int

    @classmethod
    def make(cls, vocab_size: int, *, batch: int, length: int, new_tokens: int, seed: int) -> Trial:
        """Draw the inputs.

        Raises:
            ValueError: There is nothing to pad (`batch` below 2), to decode (`length` below 6) or
                to generate.
        """
        if batch < 2 or length < 6 or new_tokens < 1:  # noqa: PLR2004 - named in the message
            raise ValueError(
                "a trial needs a batch of at least 2, a length of at least 6 and at least 1 new"
                f" token; found {batch}, {length} and {new_tokens}"
            )
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (batch, length), generator=generator)
        padding = torch.arange(batch)[:, None] % (length - sum(_AFTER_PREFILL) - 1)
        return cls(ids, (torch.arange(length) >= padding).long(), new_tokens)

    def steps(self, check: str) -> list[Step]:
        """Return the forwards of a check; those of one series share a cache, but for `LOGITS`."""
        length = self.ids.shape[1]
        if check == LOGITS:
            return [self._step(0, length, padded=False)]
        prefill = length - sum(_AFTER_PREFILL)
        spans = pairwise(accumulate((prefill, *_AFTER_PREFILL), initial=0))
        return [self._step(start, end, padded=check == PADDED) for start, end in spans]

    def _step(self, start: int, end: int, *, padded: bool) -> Step:
        """Return the forward that takes in the tokens `[start, end)`."""
        ids = self.ids[:, start:end]
        mask = self.mask[:, :end] if padded else None
        real = self.mask[:, start:end].bool() if padded else torch.ones_like(ids).bool()
        return Step(f"tokens {start} to {end - 1}", ids, mask, real)
