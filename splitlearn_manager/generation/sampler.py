"""From logits to the next tokens, for all rows of a forward at once as far as they agree.

Each row draws with a generator of its own, one number a token: what it gets does not depend on who
runs beside it.  Candidates are cut as transformers' processors cut them (temperature, then `top_k`,
`top_p`, `min_p`), but without sorting the whole vocabulary where the best few are enough.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from splitlearn_manager.generation.jobs import Continuation, Scored
from splitlearn_manager.generation.sampling import Sampling

FEW = 1024
"""Candidates that are looked at first where `top_p` says how many there are."""


@dataclass(eq=False)
class Row:
    """What one sequence's choices depend on, besides its logits.

    Attributes:
        sampling: How tokens are chosen.
        top: How many of the most probable tokens to tell; `None` for no probability at all.
        counts: How often each token was generated.
        seen: Tokens of its prompt, where they matter.
        generator: Its own; made when the first number is drawn.
        number: Which answer to its prompt it is, for its seed.
    """

    sampling: Sampling
    top: int | None = None
    seen: frozenset[int] = frozenset()
    counts: Counter[int] = field(default_factory=Counter)
    generator: torch.Generator | None = None
    number: int = 0

    def draw(self) -> float:
        """Return the next of its random numbers, [0, 1)."""
        if self.generator is None:
            seed = self.sampling.seed_of(self.number)
            self.generator = torch.Generator()
            self.generator.manual_seed(secrets.randbits(63) if seed is None else seed)
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def row_of(one: Continuation) -> Row:
    """Return what an answer's choices depend on; made when it gets its first token."""
    if one.state is None:
        job = one.job
        top = job.wanted.logprobs
        if top is None and job.wanted.totals:
            top = 0
        penalised = job.sampling.repetition_penalty != 1
        seen = frozenset(job.tokens) if penalised else frozenset()
        one.state = Row(job.sampling, top, seen, number=one.number)
    row: Row = one.state
    return row


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> list[Scored | None]:
    """Return the next token of each row; `None` where the logits are no numbers.

    Args:
        logits: [rows, vocabulary], any floating dtype.
        rows: What the choices depend on.
    """
    raw = logits.float()
    best, tokens = raw.max(dim=-1)
    finite = best.isfinite().tolist()
    chosen: list[int] = tokens.tolist()
    shaped = [n for n, row in enumerate(rows) if row.sampling.shapes and finite[n]]
    scores = raw.clone() if shaped else raw
    for number in shaped:
        _shape(scores[number], rows[number])
        chosen[number] = int(scores[number].argmax())
    for numbers in _alike(rows, finite):
        drawn = _draw(scores[numbers], [rows[number] for number in numbers])
        for number, token in zip(numbers, drawn, strict=True):
            chosen[number] = token
    for row, token in zip(rows, chosen, strict=True):
        row.counts[token] += 1
    told = _told(raw, chosen, [row.top for row in rows])
    return [one if fine else None for one, fine in zip(told, finite, strict=True)]


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Return how probable given tokens were.

    Args:
        logits: [tokens, vocabulary].
        tokens: The token at each place.
        top: How many of the most probable ones to tell with each.
    """
    return _told(logits.float(), list(tokens), [top] * len(tokens))


def _told(raw: torch.Tensor, tokens: Sequence[int], tops: Sequence[int | None]) -> list[Scored]:
    """Return tokens with their probabilities, as far as somebody asked for them."""
    told = [Scored(token) for token in tokens]
    asked = [number for number, top in enumerate(tops) if top is not None]
    if not asked:
        return told
    logprobs = raw[asked].log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor([[tokens[number]] for number in asked])).squeeze(1)
    most = max(tops[number] or 0 for number in asked)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1)
    for place, (number, logprob) in enumerate(zip(asked, own.tolist(), strict=True)):
        width = tops[number] or 0
        pairs = zip(ids[place, :width].tolist(), values[place, :width].tolist(), strict=True)
        told[number] = Scored(tokens[number], logprob, tuple(pairs))
    return told


def _shape(scores: torch.Tensor, row: Row) -> None:
    """Change the logits [vocabulary] of one row in place: bias and penalties."""
    sampling = row.sampling
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    if sampling.repetition_penalty != 1:
        known = torch.tensor([sorted(row.seen | row.counts.keys())])
        processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        scores.copy_(processor(known, scores[None])[0])
    if row.counts and (sampling.frequency_penalty or sampling.presence_penalty):
        tokens = torch.tensor(list(row.counts))
        times = torch.tensor(list(row.counts.values()), dtype=scores.dtype)
        scores[tokens] -= sampling.frequency_penalty * times + sampling.presence_penalty


def _alike(rows: Sequence[Row], finite: Sequence[bool]) -> list[list[int]]:
    """Return the rows that are drawn, those together that are drawn in the same way."""
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for number, row in enumerate(rows):
        if finite[number] and not row.sampling.greedy:
            groups.setdefault(row.sampling.choice, []).append(number)
    return list(groups.values())


def _draw(scores: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """Return a token for each row of scores [rows, vocabulary]; all have the same parameters.

    Its place is where a row's random number falls in the sums of its candidates' probabilities.
    """
    sampling = rows[0].sampling
    probabilities = (scores / sampling.temperature).softmax(dim=-1)
    candidates, ids = _candidates(probabilities, sampling)
    sums = candidates.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.tensor([[row.draw()] for row in rows], dtype=torch.float64) * sums[:, -1:]
    places = torch.searchsorted(sums, drawn, right=True).clamp_(max=sums.shape[-1] - 1)
    if ids is None:
        return list(places.squeeze(1).tolist())
    return list(ids.gather(1, places).squeeze(1).tolist())


def _candidates(
    probabilities: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities of candidates, 0 for those that are none, and which tokens they are.

    Those that are left need not add up to 1.  Without tokens they are the whole vocabulary.
    """
    vocabulary = probabilities.shape[-1]
    ids: torch.Tensor | None = None
    kept = probabilities
    if sampling.top_k and sampling.top_k < vocabulary:
        kept, ids = probabilities.topk(sampling.top_k, dim=-1)
        kept = kept / kept.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        if ids is None:
            kept, ids = _best_with(probabilities, sampling.top_p)
        before = kept.cumsum(dim=-1) - kept  # of the better ones; the best has none
        kept = kept.masked_fill(before >= max(sampling.top_p, torch.finfo(kept.dtype).tiny), 0)
    if sampling.min_p:
        least = kept.amax(dim=-1, keepdim=True) * sampling.min_p
        kept = kept.masked_fill(kept < least, 0)
    return kept, ids


def _best_with(probabilities: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best tokens, the best first, that in every row have this share together."""
    vocabulary = probabilities.shape[-1]
    if vocabulary > FEW:
        kept, ids = probabilities.topk(FEW, dim=-1)
        if bool((kept.sum(dim=-1) > share).all()):
            return kept, ids
    return probabilities.sort(dim=-1, descending=True)
