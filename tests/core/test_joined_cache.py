"""Sequences that share forwards: each gets what it would get alone, and keeps its own cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from joining import (
    LENGTHS,
    STEPS,
    TOLERANCE,
    alone,
    hidden_states,
    largest_difference,
    load_ends,
    step,
)

from splitlearn_core import SplitModel
from splitlearn_core.cache import PartCache
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import JoinedCache, joinable

TYPES = ["gpt2", "llama", "qwen2", "bloom", "opt", "mpt", "gemma2", "gemma3_text", "gpt_oss"]
TYPES += ["mixtral", "deepseek_v3", "mamba", "mamba2", "falcon_h1", "bamba", "nemotron_h"]
TYPES += ["qwen3_next", "lfm2", "zamba2"]


# `scripts/soak architectures` does this for every type.
@pytest.mark.parametrize("model_type", TYPES)
def test_each_sequence_gets_what_it_would_get_alone(model_type: str) -> None:
    difference = largest_difference(model_type)

    assert difference is not None
    assert difference <= TOLERANCE


@pytest.mark.parametrize(
    "model_type", ["gemma3n_text", "deepseek_v32", "git", "recurrent_gemma", "openai-gpt"]
)
def test_what_can_not_be_joined_says_so(model_type: str) -> None:
    assert not joinable(load_ends(model_type)[1]).steps


def test_sequences_that_take_turns_do_not_mix() -> None:
    """The modules of this type keep states of their own, of whichever sequence came last."""
    bottom, trunk = load_ends("recurrent_gemma")
    trunk = copy.deepcopy(trunk)
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        expected = [alone(trunk, sequence) for sequence in inputs]
        caches = [trunk.new_cache() for _ in inputs]
        for number in range(1 + STEPS):
            for sequence, cache, wanted in zip(inputs, caches, expected, strict=True):
                output = trunk(sequence[number].handed_on, past_key_values=cache)
                assert torch.equal(output, wanted[number])


def test_the_control_other_positions_give_another_result() -> None:
    bottom, trunk = load_ends("llama")
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        caches = [_prompt(trunk, sequence[0]) for sequence in inputs]
        joined = JoinedCache(caches)
        given = torch.cat([sequence[1].tensor for sequence in inputs])
        wrong = trunk(given, attention_mask=joined.mask(1), past_key_values=joined)
    right = torch.cat([alone(trunk, sequence[:2])[1] for sequence in inputs])

    assert (wrong - right).abs().max() / right.abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon_h1"])
def test_a_forward_that_failed_half_way_leaves_no_trace(model_type: str) -> None:
    bottom, trunk = load_ends(model_type)
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        caches = [_prompt(trunk, sequence[0]) for sequence in inputs]
        joined = JoinedCache(caches)
        layers: Any = trunk.model.get_submodule("model.layers")
        handle = layers[3].register_forward_pre_hook(_fails)
        with pytest.raises(ArithmeticError):
            trunk(
                torch.cat([sequence[1].tensor for sequence in inputs]),
                attention_mask=joined.mask(1),
                position_ids=joined.position_ids(1),
                past_key_values=joined,
            )
        handle.remove()
        joined.roll_back()

        assert [cache.length for cache in caches] == list(LENGTHS)
        output = step(trunk, caches, [sequence[1] for sequence in inputs])
    wanted = torch.cat([alone(trunk, sequence[:2])[1] for sequence in inputs])
    assert (output - wanted).abs().max() / wanted.abs().max() <= TOLERANCE
    assert [cache.length for cache in caches] == [length + 1 for length in LENGTHS]


def test_rows_of_one_length_need_no_mask() -> None:
    bottom, trunk = load_ends("llama")
    with torch.inference_mode():
        first = hidden_states(bottom)[0][0]
        joined = JoinedCache([_prompt(trunk, first), _prompt(trunk, first)])

    assert joined.mask(1) is None
    own = torch.ones(1, LENGTHS[0] + 1, dtype=torch.uint8)
    own[0, 0] = 0
    assert joined.mask(1, [own, None]).tolist() == [own[0].tolist(), [1] * (LENGTHS[0] + 1)]


def test_a_cache_that_is_empty_or_of_another_part_is_refused() -> None:
    bottom, trunk = load_ends("llama")
    with torch.inference_mode():
        filled = _prompt(trunk, hidden_states(bottom)[0][0])
    empty, other = trunk.new_cache(), bottom.new_cache()
    assert isinstance(empty, PartCache)
    assert isinstance(other, PartCache)

    with pytest.raises(ValueError, match="empty: 1"):
        JoinedCache([filled, empty])
    with pytest.raises(ValueError, match="the same part"):
        JoinedCache([filled, other])
    with pytest.raises(ValueError, match="one or more"):
        JoinedCache([])


def test_memory_grows_with_what_is_held_and_a_block_at_most() -> None:
    bottom, trunk = load_ends("llama")
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        caches = [_prompt(trunk, sequence[0]) for sequence in inputs]
        for number in range(1, STEPS + 1):
            step(trunk, caches, [sequence[number] for sequence in inputs])

    config: Any = trunk.config
    per_position = 2 * 2 * config.num_key_value_heads * config.head_dim * 4  # keys, values; layers
    for cache, length in zip(caches, LENGTHS, strict=True):
        held = cache.rows * (length + STEPS) * per_position
        assert held <= cache.allocated_nbytes <= held + cache.rows * 64 * per_position


def _prompt(trunk: SplitModel, given: HiddenState) -> PartCache:
    """Return a cache that holds a prompt."""
    cache = trunk.new_cache()
    assert isinstance(cache, PartCache)
    trunk(given.handed_on, past_key_values=cache)
    return cache


def _fails(*_: Any) -> None:
    raise ArithmeticError("in the middle")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_depend_on_the_longest_are_not_shared(kind: str) -> None:
    trunk = load_ends("phi3")[1]
    assert joinable(trunk).steps
    trunk.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0}

    assert joinable(trunk)[:2] == (False, False)
