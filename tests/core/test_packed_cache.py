"""Sequences that are packed into one row: each gets what it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joining import TOLERANCE, alone, hidden_states, load_ends, packed_difference

from splitlearn_core import SplitModel, cache_room
from splitlearn_core.cache import PartCache
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import joinable
from splitlearn_core.packed_cache import PackedCache
from splitlearn_core.session_attention import attend_in_place

TYPES = ["gpt2", "llama", "qwen2", "opt", "mixtral", "gemma3_text", "mistral", "cohere2", "olmo3"]


# `scripts/soak architectures` does this for every type.
@pytest.mark.parametrize("model_type", TYPES)
def test_each_sequence_gets_what_it_would_get_alone(model_type: str) -> None:
    difference = packed_difference(model_type)

    assert difference is not None
    assert difference <= TOLERANCE


@pytest.mark.parametrize("model_type", ["bloom", "deepseek_v3", "falcon_h1", "gemma2", "bert"])
def test_what_can_not_be_packed_says_so(model_type: str) -> None:
    trunk = load_ends(model_type)[1]
    attend_in_place(trunk)
    assert not joinable(trunk).packed


def test_a_part_that_does_not_attend_in_place_can_not_be_packed() -> None:
    bottom, trunk = load_ends("llama")
    assert not joinable(trunk).packed
    attend_in_place(trunk)
    assert joinable(trunk).packed
    assert not joinable(bottom).packed


def test_the_control_other_positions_give_another_result() -> None:
    trunk, inputs, caches = _two_sequences()
    packed = PackedCache(caches, [(1, one.new) for one in inputs])
    with torch.inference_mode():
        output = _run(trunk, packed, inputs, packed.position_ids().flip(1))
        wanted = alone(trunk, inputs[:1])[0]

    found = packed.unpack(output)[0].tensor
    assert (found - wanted).abs().max() / wanted.abs().max() > 1e-3


def test_a_forward_that_failed_half_way_leaves_no_trace() -> None:
    trunk, inputs, caches = _two_sequences()
    layers: Any = trunk.model.get_submodule("model.layers")
    sizes = [(1, one.new) for one in inputs]
    handle = layers[3].register_forward_pre_hook(_fails)
    packed = PackedCache(caches, sizes)
    with torch.inference_mode():
        with pytest.raises(ArithmeticError):
            _run(trunk, packed, inputs, packed.position_ids())
        handle.remove()
        packed.roll_back()
        assert [cache.length for cache in caches] == [0, 0]
        assert [cache.rows for cache in caches] == [0, 0]

        packed = PackedCache(caches, sizes)
        output = _run(trunk, packed, inputs, packed.position_ids())
        packed.commit()
        wanted = [alone(trunk, [one])[0] for one in inputs]
    assert [cache.length for cache in caches] == [one.new for one in inputs]
    for found, other in zip(packed.unpack(output), wanted, strict=True):
        assert (found.tensor - other).abs().max() / other.abs().max() <= TOLERANCE


def test_what_was_there_is_there_after_a_forward_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the caches had to move to a larger room meanwhile."""
    monkeypatch.setattr(cache_room, "_SPACES", (1,))  # room for twice what comes
    trunk, inputs, caches = _two_sequences()
    layers: Any = trunk.model.get_submodule("model.layers")
    with torch.inference_mode():
        for cache, given in zip(caches, inputs, strict=True):
            trunk(given.handed_on, past_key_values=cache)
        before = [cache.layers[2].keys.clone() for cache in caches]
        more = [HiddenState(given.tensor.repeat(1, 3, 1)) for given in inputs]
        for fails in (True, False):
            packed = PackedCache(caches, [(1, one.new) for one in more])
            handle = layers[3].register_forward_pre_hook(_fails)
            if fails:
                with pytest.raises(ArithmeticError):
                    _run(trunk, packed, more, packed.position_ids())
                packed.roll_back()
                assert all(map(torch.equal, [one.layers[2].keys for one in caches], before))
            handle.remove()
        output = _run(trunk, packed, more, packed.position_ids())
        packed.commit()
        wanted = [alone(trunk, pair)[1] for pair in zip(inputs, more, strict=True)]

    for found, other in zip(packed.unpack(output), wanted, strict=True):
        assert (found.tensor - other).abs().max() / other.abs().max() <= TOLERANCE


def test_rows_of_a_sequence_stand_one_behind_the_other() -> None:
    _, _, caches = _two_sequences()
    packed = PackedCache(caches, [(2, 3), (1, 1)])
    first = HiddenState(torch.arange(6.0).view(2, 3, 1), {"ids": torch.arange(6).view(2, 3)})
    second = HiddenState(torch.tensor([[[9.0]]]), {"ids": torch.tensor([[9]])})
    row = packed.pack([first, second])

    assert row.tensor.flatten().tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert row.side["ids"].tolist() == [[0, 1, 2, 3, 4, 5, 9]]
    assert packed.position_ids().tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    for found, given in zip(packed.unpack(row), (first, second), strict=True):
        assert torch.equal(found.tensor, given.tensor)
        assert torch.equal(found.side["ids"], given.side["ids"])


def test_keys_of_several_sequences_are_no_operand_of_anything_else() -> None:
    trunk, inputs, caches = _two_sequences()
    packed = PackedCache(caches, [(1, one.new) for one in inputs])
    config: Any = trunk.config
    heads, size = config.num_key_value_heads, config.head_dim
    states = torch.randn(1, heads, sum(one.new for one in inputs), size)
    with torch.inference_mode():
        keys, _ = packed.layers[trunk.start_layer].update(states, states)

    with pytest.raises(TypeError, match=r"no operand of aten\.add"):
        keys.add(1)
    assert repr(keys) == "PackedStates(of 2 sequences)"


def test_caches_of_different_parts_are_refused() -> None:
    bottom, trunk = load_ends("llama")
    own, other = trunk.new_cache(), bottom.new_cache()
    assert isinstance(own, PartCache)
    assert isinstance(other, PartCache)
    with pytest.raises(ValueError, match="the same part"):
        PackedCache([own, other], [(1, 1), (1, 1)])
    with pytest.raises(ValueError, match="one or more"):
        PackedCache([], [])


def _two_sequences() -> tuple[SplitModel, list[HiddenState], list[PartCache]]:
    """Return a Trunk, two prompts for it, and an empty cache for each."""
    bottom, trunk = load_ends("llama")
    attend_in_place(trunk)
    with torch.inference_mode():
        inputs = [sequence[0] for sequence in hidden_states(bottom)]
    caches = [trunk.new_cache() for _ in range(2)]
    return trunk, [inputs[0], inputs[3]], [one for one in caches if isinstance(one, PartCache)]


def _run(
    trunk: SplitModel, packed: PackedCache, inputs: list[HiddenState], positions: torch.Tensor
) -> HiddenState:
    output = trunk(
        packed.pack(inputs).handed_on,
        attention_mask=packed.mask,
        position_ids=positions,
        past_key_values=packed,
    )
    return HiddenState.of(output)


def _fails(*_: Any) -> None:
    raise ArithmeticError("no")
