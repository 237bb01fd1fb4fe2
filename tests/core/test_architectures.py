"""Every certified architecture: parts equal the unsplit model to the bit."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from certifier import DifferenceError, certify, compare_tensors, tensors_of
from tiny_models import causal_types, tiny_model

from splitlearn_core import pruning
from splitlearn_core.errors import UnsupportedModelError
from splitlearn_core.families import CERTIFIED, KNOWN_TYPES, Family, architectures, family_of
from splitlearn_core.tracing import NotAChainError, observe
from splitlearn_core.uncertified import any_family

if TYPE_CHECKING:
    from splitlearn_core import SplitModel


# Two cuts; `scripts/soak architectures` tries others.
@pytest.mark.parametrize("model_type", KNOWN_TYPES)
def test_certified(model_type: str) -> None:
    certify(model_type, family_of(model_type))


def test_every_causal_type_has_an_entry_and_every_refusal_a_reason() -> None:
    known = architectures()

    assert sorted(known) == causal_types()
    assert len(KNOWN_TYPES) >= 150
    assert all(entry.reason for entry in known.values() if entry.status != CERTIFIED)


def test_no_entry_depends_on_the_size_of_the_model_that_it_was_found_with() -> None:
    """A real model has more of whatever a small one has several of."""
    families = [entry.family for entry in architectures().values() if entry.family is not None]
    paths = {p for f in families for p in (*f.embeddings, *f.epilogue, *f.unused)}

    assert [path for path in paths if re.search(r"\.\d", path)] == []


def test_a_family_is_the_same_after_a_trip_through_json() -> None:
    for entry in architectures().values():
        if entry.family is not None:
            assert Family.from_dict(json.loads(json.dumps(entry.family.to_dict()))) == entry.family


WATCHED = ["gpt2", "llama", "mixtral", "mamba", "opt", "gemma3_text", "nemotron_h"]
WATCHED += ["deepseek_v4", "glm_moe_dsa", "zaya", "gemma3n_text", "gemma4"]


@pytest.mark.parametrize("model_type", WATCHED)
def test_the_table_says_what_the_forward_shows(model_type: str) -> None:
    assert observe(tiny_model(model_type)) == family_of(model_type)


def test_a_refused_type_says_why() -> None:
    with pytest.raises(UnsupportedModelError, match=r"block_states.*--allow-uncertified"):
        family_of("inkling2_text")


@pytest.mark.parametrize(
    "model_type", ["bart", "blenderbot", "marian", "mbart", "musicgen", "plbart", "whisper"]
)
def test_an_encoder_decoder_is_refused_as_one(model_type: str) -> None:
    with pytest.raises(NotAChainError, match="is an encoder-decoder, no decoder-only model"):
        tiny_model(model_type)
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        family_of(model_type)
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        any_family(model_type)


@pytest.mark.parametrize("model_type", ["minimax", "rwkv", "xlstm", "reformer"])
def test_a_type_with_a_cache_of_its_own_is_refused_as_one(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="keeps a cache of its own kind"):
        family_of(model_type)


def test_what_is_no_chain_is_found_out() -> None:
    with pytest.raises(NotAChainError, match="more than the hidden state"):
        observe(tiny_model("inkling2_text"))


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.rotary_emb.inv_freq"])
@pytest.mark.parametrize("change", ["dtype", "values"])
def test_a_tensor_that_differs_is_found_out(name: str, change: str) -> None:
    """The control: neither a dtype nor a value, stored or computed, may differ unseen."""
    unsplit = tiny_model("llama")
    part = tiny_model("llama")
    compare_tensors(tensors_of(unsplit), [cast("SplitModel", SimpleNamespace(model=part))])
    module, _, slot = name.rpartition(".")
    tensor = getattr(part.get_submodule(module), slot)
    tensor.data = tensor.data.bfloat16() if change == "dtype" else tensor.data + 1

    with pytest.raises(DifferenceError, match=re.escape(name)):
        compare_tensors(tensors_of(unsplit), [cast("SplitModel", SimpleNamespace(model=part))])


def test_parts_that_are_given_nothing_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where no part sees what the one before it computed, certifying must fail."""
    monkeypatch.setattr(pruning, "_let_in", lambda *_: None)

    with pytest.raises(DifferenceError, match="one forward"):
        certify("llama", family_of("llama"), cuts=((2, 4),))
