"""Every way of generating gives over a chain what it gives with the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from splitlearn_core import SplitCausalLM
from splitlearn_core.cache import ChainCache
from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.quickstart import load_split_model

Pair = tuple[Any, SplitCausalLM]

# Full attention; a window of 8 that the text outgrows, in all layers and in every other; layers
# that share keys and values across the cuts; convolutions.
TYPES = ["gpt2", "mistral", "gemma2", "gemma3_text", "gemma3n_text", "lfm2_moe"]
WAYS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, sampled": {"prompt_lookup_num_tokens": 3, "do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, sampled": {"num_beams": 2, "do_sample": True},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "prefill in chunks": {"prefill_chunk_size": 5},
}
PROMPT = torch.tensor([[5, 9, 17, 5, 9, 17, 23, 5, 9, 17, 5, 9]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Return a function that gives a small model of a type, and the chain of its parts."""
    made: dict[str, Pair] = {}
    root: Path = tmp_path_factory.mktemp("models")

    def find(model_type: str) -> Pair:
        if model_type not in made:
            folder = root / model_type
            tiny_model(model_type).save_pretrained(folder)
            unsplit = AutoModelForCausalLM.from_pretrained(folder).eval()
            chain = SplitCausalLM(*load_split_model("auto", [2, 4], folder))
            made[model_type] = (unsplit, chain)
        return made[model_type]

    return find


def generate(model: Any, prompt: torch.Tensor = PROMPT, **how: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        prompt,
        max_new_tokens=16,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **how,
    )


def assert_same(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for step, (logits, expected) in enumerate(zip(one.logits, other.logits, strict=True)):
        assert torch.equal(logits, expected), f"step {step}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", TYPES)
def test_it_gives_what_the_unsplit_model_gives(
    model_type: str, way: str, pair: Callable[[str], Pair]
) -> None:
    unsplit, chain = pair(model_type)

    assert_same(generate(chain, **WAYS[way]), generate(unsplit, **WAYS[way]))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_chain_can_be_assisted_and_assist(model_type: str, pair: Callable[[str], Pair]) -> None:
    """The assistant's guesses are good enough to be taken, and bad enough to be taken back."""
    unsplit, chain = pair(model_type)
    helper = copy.deepcopy(unsplit)
    for weight in helper.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.002)

    expected = generate(unsplit, assistant_model=helper)

    assert_same(generate(chain, assistant_model=helper), expected)
    assert_same(
        generate(unsplit, assistant_model=chain), generate(unsplit, assistant_model=unsplit)
    )


@pytest.mark.parametrize("model_type", ["bamba", "mamba"])
def test_recurrent_states_can_not_be_taken_back(
    model_type: str, pair: Callable[[str], Pair]
) -> None:
    for model in pair(model_type):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(model, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gemma3n_text"])
@torch.no_grad()
def test_a_conversation_goes_on_from_a_copy_of_its_cache(
    model_type: str, pair: Callable[[str], Pair]
) -> None:
    unsplit, chain = pair(model_type)
    more = torch.cat([PROMPT, torch.tensor([[3, 4, 5]])], dim=1)

    def twice(model: Any) -> list[Any]:
        cache = model(PROMPT, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        return [generate(model, more, past_key_values=c) for c in (cache, kept)]

    for one, other in zip(twice(chain), twice(unsplit), strict=True):
        assert_same(one, other)


# --- What the cache itself is asked ------------------------------------------------------------


def answers(cache: Any) -> dict[str, Any]:
    """Return what a cache says of the model's six layers."""
    attention = [n for n in range(6) if not cache.is_linear[n] and not cache.is_dummy[n]]
    return {
        "sliding": cache.is_sliding[:6],
        "linear": cache.is_linear[:6],
        "dummy": cache.is_dummy[:6],
        "croppable": cache.is_croppable,
        "initialized": cache.is_initialized,
        "length": cache.get_seq_length(),
        "most": cache.get_max_length(),
        "offset": cache.get_query_offset(),
        "recording": [cache.is_recording_past(n) for n in range(6)],
        "masks": [cache.get_mask_sizes(3, n) for n in attention],
    }


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_the_cache_answers_as_that_of_the_unsplit_model(
    model_type: str, pair: Callable[[str], Pair]
) -> None:
    unsplit, chain = pair(model_type)
    caches = DynamicCache(config=unsplit.config), chain.new_cache()
    for cache in caches:
        cache.activate_past_recording()
    for model, cache in zip((unsplit, chain), caches, strict=True):
        model(PROMPT, past_key_values=cache)

    assert answers(caches[1]) == answers(caches[0])


@torch.no_grad()
def test_cropping_and_choosing_rows_goes_through_all_parts(pair: Callable[[str], Pair]) -> None:
    unsplit, chain = pair("gemma2")
    caches = DynamicCache(config=unsplit.config), chain.new_cache()
    ways: list[Any] = []
    for model, cache in zip((unsplit, chain), caches, strict=True):
        cache.activate_past_recording()
        model(PROMPT, past_key_values=cache)
        cache.crop(-3)
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        ways.append(model(PROMPT[:, -3:].expand(2, 3), past_key_values=cache).logits)

    assert torch.equal(ways[1], ways[0])
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == PROMPT.shape[1]


@torch.no_grad()
def test_a_crop_that_fails_half_way_leaves_a_cache_that_can_only_be_reset(
    pair: Callable[[str], Pair],
) -> None:
    _, chain = pair("mistral")
    cache = chain.new_cache()
    chain(PROMPT, past_key_values=cache)

    with pytest.raises(ValueError, match="negative number"):  # before anything was changed
        cache.crop(3)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    with pytest.raises(CacheMismatchError, match="begin again"):
        chain(PROMPT, past_key_values=cache)

    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(chain(PROMPT, past_key_values=cache).logits, chain(PROMPT).logits)


def test_a_cache_that_is_elsewhere_says_what_it_can_not_do(pair: Callable[[str], Pair]) -> None:
    """Nothing was changed in the others then."""
    _, chain = pair("gpt2")

    class Elsewhere:
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return layer_idx

    bottom, _, top = chain.new_cache().parts
    cache = ChainCache([bottom, Elsewhere(), top])

    with pytest.raises(NotImplementedError, match="without beams, assistant_model"):
        cache.activate_past_recording()
    assert len(cache.layers) == 6
    assert not cache.is_croppable


@torch.no_grad()
def test_a_reset_that_one_part_can_not_do_leaves_the_cache_unusable(
    pair: Callable[[str], Pair],
) -> None:
    _, chain = pair("gpt2")

    class Elsewhere:
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return layer_idx

    cache = ChainCache([chain.new_cache().parts[0], Elsewhere()])
    with pytest.raises(KeyError), cache.step():
        raise KeyError

    with pytest.raises(NotImplementedError, match="can't do reset"):
        cache.reset()
    with pytest.raises(CacheMismatchError, match="begin again"), cache.step():
        pass
