"""Architectures that were not certified: refused, or let in by a flag as they are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from splitlearn_core import ModelFactory, SplitCausalLM, SplitModel
from splitlearn_core.errors import UnsupportedModelError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.quickstart import load_bottom_model, load_split_model
from splitlearn_core.report import report_plan
from splitlearn_core.split_checkpoint import split_checkpoint
from splitlearn_core.uncertified import any_family
from splitlearn_core.verify import verify

# A chain of layers with a cache of its own, which parts can't be given: one forward is exact.
TYPE = "minimax"
# Its layers hand on a list that grows.
NO_CHAIN = "inkling2_text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(TYPE)
    tiny_model(TYPE).save_pretrained(path)
    return path


def test_it_is_refused_and_the_refusal_names_the_flag(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"minimax.*allow_uncertified=True") as refused:
        load_component(folder, "trunk", [2, 4])

    assert "--allow-uncertified" in str(refused.value)


def test_the_flag_lets_it_in_through_every_door(folder: Path) -> None:
    ids = torch.arange(12).reshape(2, 6)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids, use_cache=False).logits

    doors = [
        load_split_model("auto", [2, 4], folder, allow_uncertified=True),
        ModelFactory.create_split_models(TYPE, folder, 2, 4, allow_uncertified=True),
        tuple(
            load_component(folder, name, [2, 4], allow_uncertified=True)
            for name in ("bottom", "trunk", "top")
        ),
    ]

    for parts in doors:
        with torch.no_grad():
            assert torch.equal(SplitCausalLM(*parts)(ids, use_cache=False).logits, expected)


def test_plans_estimates_and_saved_parts_take_the_flag_too(folder: Path, tmp_path: Path) -> None:
    assert report_plan(folder, [2, 4], allow_uncertified=True).model_type == TYPE
    assert estimate_component(folder, "trunk", [2, 4], allow_uncertified=True).peak_bytes
    assert load_bottom_model(TYPE, 2, folder, allow_uncertified=True).end_layer == 2
    split_checkpoint(folder, [2, 4], tmp_path / "parts", allow_uncertified=True)
    with pytest.raises(UnsupportedModelError, match="allow_uncertified"):
        SplitModel.load(tmp_path / "parts" / "trunk")
    assert SplitModel.load(tmp_path / "parts" / "trunk", allow_uncertified=True).start_layer == 2


def test_verify_tells_whether_to_trust_it(folder: Path) -> None:
    report = verify(folder, [2, 4], allow_uncertified=True)

    statuses = {check.name: check.status for check in report.checks}
    assert statuses["logits"] == "equal"
    assert statuses["greedy generate"] == "different"
    assert not report.passed


def test_what_is_no_chain_stays_refused(tmp_path: Path) -> None:
    tiny_model(NO_CHAIN).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModelError, match="block_states"):
        load_component(tmp_path, "trunk", [2, 4], allow_uncertified=True)


def test_what_transformers_does_not_know_stays_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"abacus.*can't be made or run"):
        any_family("abacus")


def test_looking_at_a_type_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    any_family("xlm-roberta")
    with pytest.raises(UnsupportedModelError):
        any_family("abacus2")

    assert torch.equal(torch.rand(2), expected)
