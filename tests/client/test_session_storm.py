"""A slice of the storm over sessions; `scripts/soak sessions` is the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from session_storm.families import FAMILIES, Family
from session_storm.greedy import TIE, Greedy
from session_storm.place import Place
from session_storm.storm import Storm
from tiny_models import tiny_model

SEED = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("storm"), FAMILIES, 1.2, 1.0) as place:
        yield place
        assert not place.end()


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_clients_get_what_the_unsplit_model_says(place: Place, family: Family) -> None:
    storm = Storm(place, family, SEED, length=12)

    wrong = [f"{what}: {wrong}" for what, wrong in storm.run(streams=1) if wrong]

    assert not wrong, "\n".join([*wrong, str(storm.report)])


def test_tokens_may_differ_only_where_logits_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a tie, it is the stream's own tokens that are gone on from."""
    greedy = Greedy(tiny_model("llama"))
    own = greedy.run([5, 9], 8)
    other = [*own.tokens[:2], own.seconds[2]]
    after = greedy.run([5, 9, *other], 3).tokens

    assert greedy.judge([5, 9], own.tokens).wrong == ""
    assert "token 2 after 2" in greedy.judge([5, 9], [*other, *after]).wrong

    monkeypatch.setattr("session_storm.greedy.TIE", own.gaps[2])
    judgement = greedy.judge([5, 9], [*other, *after])
    assert (judgement.compared, judgement.ties, judgement.wrong) == (6, 1, "")
    assert "token 4 after 2" in greedy.judge([5, 9], [*other, after[0], after[1] + 1]).wrong
    assert own.gaps[2] > TIE
