"""One cache over a split model, and the rows that it is filled with, each chosen greedily."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from splitlearn_core import SplitCausalLM


@dataclass
class Line:
    """A prompt, and the tokens that were chosen after it.

    Attributes:
        prompt: What was given.
        tokens: What was chosen.
        pad: Positions of padding before the prompt.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    pad: int = 0

    @property
    def context(self) -> list[int]:
        """All that is in the row, padding included."""
        return [0] * self.pad + self.prompt + self.tokens

    def copy(self) -> Line:
        """Return a line that goes on by itself."""
        return Line(self.prompt, list(self.tokens), self.pad)

    def turned(self, token: int) -> Line:
        """Return a line that goes on from another token than was chosen last."""
        return Line([*self.prompt, *self.tokens[:-1], token], [], self.pad)


class Flow:
    """Rows of equal length, and a cache that holds all of them but what comes next.

    Args:
        model: Whose cache it is.
        rows: The rows.

    Attributes:
        cache: The cache.
        rows: The rows.
        held: Positions in the cache.
        touched: When what was answered last was asked, in monotonic seconds.
        connections: How many connections there had been when the answer came.
        cuts: How many cuts there had been when the answer came.
        refused: Drafts that were refused last.
    """

    def __init__(self, model: SplitCausalLM, rows: Sequence[Line]) -> None:
        self.model = model
        self.rows = list(rows)
        self.refused = 0
        self.begin_again()

    def begin_again(self) -> None:
        """Go on with an empty cache, whose first step brings all that there is."""
        self.cache: Any = self.model.new_cache()
        self.held = 0
        self.touched = time.monotonic()
        self.connections: int | None = None
        self.cuts = 0

    @property
    def remote(self) -> Any:
        """The Trunk's cache."""
        return self.cache.parts[1]

    @property
    def made(self) -> int:
        """Tokens that every row has."""
        return min(len(row.tokens) for row in self.rows)

    def step(self) -> None:
        """Choose the next token of each row."""
        for row, token in zip(self.rows, self._feed()[:, -1].tolist(), strict=True):
            row.tokens.append(token)

    def speculate(self, drafts: Sequence[int]) -> None:
        """Let drafts be checked at once, in the one row there is; count those that are refused."""
        (row,) = self.rows
        best = self._feed([list(drafts)])[0, -len(drafts) - 1 :].tolist()
        accepted = next((n for n, d in enumerate(drafts) if d != best[n]), len(drafts))
        self.refused = len(drafts) - accepted
        if self.refused:
            self.cache.crop(-self.refused)
        self.held -= self.refused
        row.tokens += best[: accepted + 1]

    def roll_back(self, count: int) -> None:
        """Take tokens back, and the positions that they took."""
        self.cache.crop(-count)
        self.held -= count
        self.cut_short(count)

    def cut_short(self, count: int) -> None:
        """Take tokens back."""
        for row in self.rows:
            del row.tokens[-count:]

    def reorder(self, chosen: Sequence[int]) -> None:
        """Let the rows be those that are named."""
        self.cache.reorder_cache(torch.tensor(chosen))
        self.rows = [self.rows[number].copy() for number in chosen]

    def fork(self, rows: Sequence[Line]) -> Flow:
        """Return another that holds the same, with rows that go on in another way."""
        twin = Flow(self.model, rows)
        twin.cache = self.cache.copy()
        twin.held = self.held
        return twin

    def _feed(self, more: Sequence[list[int]] = ()) -> torch.Tensor:
        """Run what is not held yet, and more; return the best token after each position."""
        contexts = [row.context for row in self.rows]
        for context, added in zip(contexts, more, strict=False):
            context.extend(added)
        ids = torch.tensor(contexts)
        given = self._told(ids.shape[1])
        with torch.inference_mode():
            output = self.model(ids[:, self.held :], past_key_values=self.cache, **given)
        self.held = ids.shape[1]
        best: torch.Tensor = output.logits.argmax(-1)
        return best

    def _told(self, length: int) -> dict[str, torch.Tensor]:
        """Return what generation tells a model of its positions: which are padding, and their ids.

        Some models count by themselves, others don't.
        """
        mask = torch.ones(len(self.rows), length, dtype=torch.int64)
        for number, row in enumerate(self.rows):
            mask[number, : row.pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self.held :]
        padded = {"attention_mask": mask} if any(row.pad for row in self.rows) else {}
        return {"position_ids": positions, **padded}
