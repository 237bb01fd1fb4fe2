"""A chain of parts is asked what the unsplit model can be asked, and says so where it can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from splitlearn_core import SplitCausalLM
from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.quickstart import load_split_model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(14).reshape(2, 7)


@pytest.fixture
def chain_of(make_checkpoint: Callable[..., Any]) -> Callable[[str], tuple[Any, SplitCausalLM]]:
    """Return a function that gives the unsplit model and the chain."""

    def load(kind: str) -> tuple[Any, SplitCausalLM]:
        checkpoint = make_checkpoint(kind)
        return checkpoint.unsplit(), SplitCausalLM(
            *load_split_model("auto", [2, 4], checkpoint.path)
        )

    return load


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_sequences_stay_apart_where_they_do_unsplit(
    kind: str, use_cache: bool | None, chain_of: Callable[[str], Any], ids: torch.Tensor
) -> None:
    """They are found by their positions, but only without a mask and a cache."""
    unsplit, chain = chain_of(kind)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "use_cache": use_cache}

    assert torch.equal(chain(ids, **packed).logits, unsplit(ids, **packed).logits)


@torch.no_grad()
def test_token_types_are_embedded(chain_of: Callable[[str], Any], ids: torch.Tensor) -> None:
    unsplit, chain = chain_of("gpt2")
    types = torch.ones_like(ids)

    logits = chain(ids, token_type_ids=types).logits

    assert torch.equal(logits, unsplit(ids, token_type_ids=types).logits)
    assert not torch.equal(logits, unsplit(ids).logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"inputs_embeds": torch.zeros(2, 7, 32)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_the_parts_do_not_hand_on_is_refused(
    arguments: dict[str, Any], chain_of: Callable[[str], Any], ids: torch.Tensor
) -> None:
    _, chain = chain_of("llama")

    with pytest.raises(ValueError, match=next(iter(arguments))):
        chain(ids, **arguments)


@torch.no_grad()
def test_a_cache_that_a_failed_step_left_uneven_is_refused(
    chain_of: Callable[[str], Any], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bottom has the step's positions then, and the parts after it have not."""
    unsplit, chain = chain_of("llama")
    cache = chain.new_cache()

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the Trunk went away")

    with monkeypatch.context() as patch:
        patch.setattr(chain.trunks[0], "forward", fail)
        with pytest.raises(ConnectionError):
            chain(ids, past_key_values=cache)

    with pytest.raises(CacheMismatchError, match="begin again"):
        chain(ids, past_key_values=cache)
    with pytest.raises(CacheMismatchError, match="begin again"):
        cache.copy()
    cache.reset()
    assert torch.equal(chain(ids, past_key_values=cache).logits, unsplit(ids).logits)


@torch.no_grad()
def test_a_copy_of_a_cache_goes_its_own_way(
    chain_of: Callable[[str], Any], ids: torch.Tensor
) -> None:
    unsplit, chain = chain_of("llama")
    cache = chain.new_cache()
    chain(ids[:, :-1], past_key_values=cache)
    copy = cache.copy()
    chain(ids[:, :1], past_key_values=copy)
    found = chain(ids[:, -1:], past_key_values=cache).logits

    assert torch.allclose(found, unsplit(ids).logits[:, -1:], atol=1e-5)
    assert copy.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_head_and_ties_are_found_where_other_libraries_look(
    kind: str, chain_of: Callable[[str], Any]
) -> None:
    unsplit, chain = chain_of(kind)

    assert torch.equal(chain.get_input_embeddings().weight, unsplit.get_input_embeddings().weight)
    assert torch.equal(chain.get_output_embeddings().weight, unsplit.get_output_embeddings().weight)
    head = chain.get_output_embeddings().weight
    chain.tie_weights()
    assert chain.get_output_embeddings().weight is head


@torch.no_grad()
def test_an_observer_is_told_of_each_call_of_a_part(
    chain_of: Callable[[str], Any], ids: torch.Tensor
) -> None:
    _, chain = chain_of("llama")
    plain = chain(ids).logits
    calls: list[tuple[str, float]] = []
    chain.observer = lambda part, seconds: calls.append((part.component, seconds))

    observed = chain(ids).logits

    assert torch.equal(observed, plain)
    assert [name for name, _ in calls] == ["bottom", "trunk", "top"]
    assert all(seconds > 0 for _, seconds in calls)


def test_closing_a_chain_closes_what_is_elsewhere(chain_of: Callable[[str], Any]) -> None:
    _, chain = chain_of("llama")
    trunk = chain.parts[1]
    closed: list[str] = []

    class Elsewhere:
        component = "trunk"
        start_layer, end_layer = trunk.start_layer, trunk.end_layer

        def close(self) -> None:
            closed.append(self.component)

    with SplitCausalLM(chain.bottom, Elsewhere(), chain.top) as remote:
        assert isinstance(remote, SplitCausalLM)
        assert not closed
    assert closed == ["trunk"]

    with chain:  # nothing to close
        pass
