"""Choosing tokens: as transformers' processors would, with draws that are a row's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from splitlearn_manager.generation.sampler import Row, _candidates, choose, score
from splitlearn_manager.generation.sampling import Sampling

GREEDY = Sampling(temperature=0)


def logits(rows: int, vocabulary: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def tokens_of(found: list[Any]) -> list[int]:
    return [one.token for one in found]


@pytest.mark.parametrize("vocabulary", [97, 5000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(top_p=0.999),
        Sampling(top_p=0.0),
        Sampling(min_p=0.2),
        Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.05),
    ],
)
def test_candidates_are_those_of_transformers(sampling: Sampling, vocabulary: int) -> None:
    scores = logits(4, vocabulary)
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    no_ids: Any = None
    expected = LogitsProcessorList(warpers)(no_ids, scores).softmax(dim=-1)

    kept, ids = _candidates((scores / sampling.temperature).softmax(dim=-1), sampling)

    found = kept if ids is None else torch.zeros_like(scores).scatter(1, ids, kept)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_draws_have_the_probabilities() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).log()
    row = Row(Sampling(seed=3))

    drawn = Counter(tokens_of(choose(scores, [row]))[0] for _ in range(4000))

    for token, probability in enumerate([0.1, 0.2, 0.3, 0.4, 0.0]):
        assert abs(drawn[token] / 4000 - probability) < 0.03
    assert drawn[4] == 0


def test_a_seed_gives_the_same_whoever_is_beside_it() -> None:
    steps = [logits(1, seed=number) for number in range(12)]
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=11)
    alone, beside = Row(sampling), Row(sampling)

    expected = [tokens_of(choose(step, [alone]))[0] for step in steps]
    found = []
    for number, step in enumerate(steps):
        others = [Row(sampling, number=1), Row(GREEDY), Row(replace(sampling, seed=None))]
        rows = [*others[: number % 4], beside]
        together = torch.cat([logits(len(rows) - 1, seed=99), step])
        found.append(tokens_of(choose(together, rows))[-1])

    assert found == expected
    assert len(set(expected)) > 1


def test_answers_to_one_prompt_have_seeds_of_their_own() -> None:
    flat = torch.zeros(8, 97)
    rows = [Row(Sampling(seed=5), number=number) for number in range(8)]

    drawn = tokens_of(choose(flat, rows))

    assert len(set(drawn)) > 1
    again = [Row(Sampling(seed=5), number=number) for number in range(8)]
    assert tokens_of(choose(flat, again)) == drawn


def test_without_a_seed_draws_differ() -> None:
    flat = torch.zeros(1, 5000)
    drawn = {tokens_of(choose(flat, [Row(Sampling())]))[0] for _ in range(8)}
    assert len(drawn) > 1


def test_greedy_takes_the_best() -> None:
    scores = logits(5)
    rows = [Row(GREEDY), Row(Sampling(top_k=1)), Row(GREEDY), Row(Sampling(top_p=0.0)), Row(GREEDY)]

    assert tokens_of(choose(scores, rows)) == scores.argmax(-1).tolist()


def test_penalties_and_biases_are_for_their_row_alone() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).expand(4, -1)
    rows = [
        Row(GREEDY),
        Row(replace(GREEDY, logit_bias={0: -100.0})),
        Row(replace(GREEDY, frequency_penalty=0.6)),
        Row(replace(GREEDY, presence_penalty=1.5)),
    ]

    found = [tokens_of(choose(scores, rows)) for _ in range(4)]

    by_row = list(zip(*found, strict=True))
    assert by_row[0] == (0, 0, 0, 0)
    assert by_row[1] == (1, 1, 1, 1)
    assert by_row[2] == (0, 0, 1, 0)  # 5, 4.4, then 3.8 against 4, then 3.8 against 3.4
    assert by_row[3] == (0, 1, 0, 0)  # 3.5 against 4, then 3.5 against 2.5


def test_the_repetition_penalty_is_transformers_and_counts_the_prompt() -> None:
    scores = logits(1)
    prompt = torch.tensor([[3, 7, 7, 50]])
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    expected = processor(prompt, scores.clone()).argmax(-1).tolist()  # type: ignore[arg-type]

    row = Row(replace(GREEDY, repetition_penalty=1.8), seen=frozenset(prompt[0].tolist()))

    assert tokens_of(choose(scores, [row])) == expected


def test_probabilities_are_the_models_own() -> None:
    scores = logits(2)
    expected = scores.log_softmax(-1)
    rows = [Row(Sampling(temperature=0, logit_bias={4: 100}), top=3), Row(GREEDY)]

    first, second = choose(scores, rows)

    assert first is not None
    assert second is not None
    assert first.token == 4
    assert first.logprob == pytest.approx(float(expected[0, 4]))
    best = expected[0].topk(3)
    assert first.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert second.logprob is None


def test_given_tokens_are_scored() -> None:
    scores = logits(3)

    found = score(scores, [1, 2, 3], 0)

    expected = scores.log_softmax(-1)
    assert [one.logprob for one in found] == pytest.approx(
        [float(expected[place, token]) for place, token in enumerate([1, 2, 3])]
    )
    assert found[0].top == ()


def test_a_row_without_numbers_has_no_token_and_spoils_none() -> None:
    scores = logits(3)
    scores[1, 5] = float("nan")
    rows = [Row(Sampling(seed=1)), Row(Sampling(seed=1)), Row(Sampling(seed=1))]

    first, second, third = choose(scores, rows)

    assert second is None
    assert first is not None
    assert third is not None
