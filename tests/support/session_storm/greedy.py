"""What the unsplit model says to tokens that were chosen greedily."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

TIE = 1e-4
"""Two best logits that are no further apart may change places."""


@dataclass(frozen=True)
class Judgement:
    """What a stream came to.

    Attributes:
        compared: Tokens that were compared.
        ties: Those that differ where the two best logits are within `TIE`.
        wrong: What is wrong, if anything is.
    """

    compared: int
    ties: int = 0
    wrong: str = ""


@dataclass(frozen=True)
class Run:
    """The unsplit model's own tokens after a prompt.

    Attributes:
        tokens: The best at each place.
        seconds: The second best.
        gaps: How far their logits are apart.
    """

    tokens: list[int]
    seconds: list[int]
    gaps: list[float]


class Greedy:
    """The unsplit model, which generates greedily.

    Args:
        model: In the dtype, and with the number of threads, of the parts.
        turn: Held while the model runs.
    """

    def __init__(
        self, model: PreTrainedModel, turn: AbstractContextManager[object] | None = None
    ) -> None:
        self._model = model
        self._turn = nullcontext() if turn is None else turn
        self._runs: dict[tuple[int, ...], Run] = {}
        model.generation_config.eos_token_id = None
        model.generation_config.max_length = None

    def judge(self, prompt: Sequence[int], tokens: Sequence[int]) -> Judgement:
        """Compare tokens with the model's own; after a tie, with those that follow from them."""
        given, left, ties = list(prompt), list(tokens), 0
        while left:
            run = self.run(given, len(left))
            if (place := _first_difference(run.tokens, left)) is None:
                break
            if run.gaps[place] > TIE or left[place] != run.seconds[place]:
                wrong = (
                    f"token {len(given) + place - len(prompt)} after {len(prompt)} is"
                    f" {left[place]}, the unsplit model has {run.tokens[place]},"
                    f" by {run.gaps[place]:.2g}"
                )
                return Judgement(len(tokens), ties, wrong)
            ties += 1
            given, left = given + left[: place + 1], left[place + 1 :]
        return Judgement(len(tokens), ties)

    def known(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens after a prompt, if they are known already."""
        run = self._runs.get(tuple(prompt))
        return [] if run is None else run.tokens

    def prepare(self, prompts: Sequence[Sequence[int]], length: int) -> None:
        """Generate what many lines will be compared with."""
        for prompt in prompts:
            self._runs[tuple(prompt)] = self._generate(tuple(prompt), length)

    def run(self, prompt: Sequence[int], length: int) -> Run:
        """Return what the model generates, so many tokens or more."""
        run = self._runs.get(tuple(prompt))
        if run is not None and len(run.tokens) >= length:
            return run
        return self._generate(tuple(prompt), length)

    def _generate(self, prompt: tuple[int, ...], length: int) -> Run:
        ids = torch.tensor([prompt])
        with self._turn, torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.cat(output.logits).float().topk(2)
        first, second = best.indices.T.tolist()
        assert output.sequences[0, len(prompt) :].tolist() == first
        return Run(first, second, (best.values[:, 0] - best.values[:, 1]).tolist())


def _first_difference(own: Sequence[int], found: Sequence[int]) -> int | None:
    pairs = zip(own, found, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)
