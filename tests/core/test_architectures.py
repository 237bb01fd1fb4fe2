"""Every certified architecture: parts equal the unsplit model to the bit."""

from __future__ import annotations

import pytest
from certifier import DifferenceError, certify
from tiny_models import causal_types, tiny_model

from splitlearn_core import pruning
from splitlearn_core.errors import UnsupportedModelError
from splitlearn_core.families import CERTIFIED, KNOWN_TYPES, architectures, family_of
from splitlearn_core.tracing import NotAChainError, observe

# One cut of four parts here; `scripts/soak architectures` tries all cuts.
CUT = (1, 3, 5)


@pytest.mark.parametrize("model_type", KNOWN_TYPES)
def test_certified(model_type: str) -> None:
    certify(model_type, family_of(model_type), cuts=(CUT,))


def test_every_causal_type_has_an_entry_and_every_refusal_a_reason() -> None:
    known = architectures()

    assert sorted(known) == causal_types()
    assert len(KNOWN_TYPES) >= 140
    assert all(entry.reason for entry in known.values() if entry.status != CERTIFIED)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "mamba", "opt", "gemma3_text"])
def test_the_table_says_what_the_forward_shows(model_type: str) -> None:
    assert observe(tiny_model(model_type)) == family_of(model_type)


def test_a_refused_type_says_why() -> None:
    with pytest.raises(UnsupportedModelError, match="prev_topk_indices"):
        family_of("glm_moe_dsa")


def test_what_is_no_chain_is_found_out() -> None:
    with pytest.raises(NotAChainError, match="more than the hidden state"):
        observe(tiny_model("glm_moe_dsa"))


def test_parts_that_are_given_nothing_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where no part sees what the one before it computed, certifying must fail."""
    monkeypatch.setattr(pruning, "_let_in", lambda *_: None)

    with pytest.raises(DifferenceError, match="one forward"):
        certify("llama", family_of("llama"), cuts=(CUT,))
