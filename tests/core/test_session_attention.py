"""Attention in place gives what transformers' own gives, and copies nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joining import LENGTHS, TOLERANCE, alone, hidden_states, load_ends, step

from splitlearn_core import SplitModel
from splitlearn_core.cache import PartCache
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import JoinedAttention, JoinedCache
from splitlearn_core.session_attention import (
    NAME,
    RaggedStates,
    attend,
    attend_in_place,
    attends_in_place,
)

GROUPED = ["llama", "qwen2", "gemma3_text", "mixtral"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", GROUPED)
def test_pieces_of_a_prompt_are_equal_to_the_bit(model_type: str, dtype: torch.dtype) -> None:
    bottom, trunk = load_ends(model_type)
    trunk = trunk.to(dtype)
    ids = torch.arange(3, 43)[None].repeat(2, 1)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :3] = 0
    given = HiddenState.of(bottom(ids)).tensor.to(dtype)

    before = _in_pieces(trunk, given, mask)
    assert attend_in_place(trunk)
    after = _in_pieces(trunk, given, mask)

    assert torch.equal(before, after)


def _in_pieces(trunk: SplitModel, given: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    cache = trunk.new_cache()
    outputs = []
    with torch.inference_mode():
        for start, stop in ((0, 9), (9, 10), (10, 26), (26, 28), (28, 40)):
            outputs.append(
                trunk(
                    given[:, start:stop],
                    attention_mask=mask[:, :stop],
                    past_key_values=cache,
                )
            )
    return torch.cat(outputs, dim=1)


def test_no_sequence_is_copied_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor padded: neither for one token of each, nor for several."""
    bottom, trunk = load_ends("qwen2")
    assert attend_in_place(trunk)

    def refuse(self: Any, *_: Any) -> None:
        raise AssertionError(f"{self} was padded")

    monkeypatch.setattr(RaggedStates, "padded", refuse)
    monkeypatch.setattr(JoinedAttention, "_padded", refuse)
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        caches = [_prompt(trunk, sequence[0]) for sequence in inputs]
        output = step(trunk, caches, [sequence[1] for sequence in inputs])
        joined = JoinedCache(caches, in_place=True)
        three = torch.cat([torch.cat([sequence[2].tensor] * 3, dim=1) for sequence in inputs])
        chunk = trunk(
            three,
            attention_mask=joined.mask(3),
            position_ids=joined.position_ids(3),
            past_key_values=joined,
        )
        wanted = torch.cat([alone(trunk, sequence[:2])[1] for sequence in inputs])
        alone_chunk = torch.cat(
            [
                alone(trunk, [*s[:2], HiddenState(torch.cat([s[2].tensor] * 3, dim=1))])[2]
                for s in inputs
            ]
        )

    assert (output - wanted).abs().max() / wanted.abs().max() <= TOLERANCE
    assert (chunk - alone_chunk).abs().max() / alone_chunk.abs().max() <= TOLERANCE
    assert [cache.length for cache in caches] == [length + 1 for length in LENGTHS]


def test_padding_of_a_sequence_of_its_own_stays_hidden() -> None:
    bottom, trunk = load_ends("llama")
    attend_in_place(trunk)
    ids = torch.arange(3, 12)[None]
    own = torch.ones(1, 9, dtype=torch.int64)
    own[0, :4] = 0
    given = HiddenState.of(bottom(ids)).tensor
    with torch.inference_mode():
        padded, other = trunk.new_cache(), trunk.new_cache()
        assert isinstance(padded, PartCache)
        assert isinstance(other, PartCache)
        trunk(given[:, :8], attention_mask=own[:, :8], past_key_values=padded)
        trunk(given[:, :3], past_key_values=other)
        joined = JoinedCache([padded, other], in_place=True)
        output = trunk(
            given[:, 8:].repeat(2, 1, 1),
            attention_mask=joined.mask(1, [own.to(torch.uint8), None]),
            position_ids=torch.tensor([[8], [3]]),
            past_key_values=joined,
        )
        cache = trunk.new_cache()
        trunk(given[:, :8], attention_mask=own[:, :8], past_key_values=cache)
        wanted = trunk(
            given[:, 8:],
            attention_mask=own,
            position_ids=torch.tensor([[8]]),
            past_key_values=cache,
        )

    assert (output[:1] - wanted).abs().max() / wanted.abs().max() <= TOLERANCE


def test_whoever_looks_into_ragged_states_gets_the_padded_tensor() -> None:
    pieces = [torch.randn(1, 2, length, 4) for length in (3, 5)]
    ragged = RaggedStates(pieces, [slice(0, 1), slice(1, 2)])

    assert (ragged.shape, ragged.dtype) == ((2, 2, 5, 4), torch.float32)
    assert torch.equal(ragged[:1, :, :2], torch.zeros(1, 2, 2, 4))
    assert torch.equal(ragged.clone()[:1, :, 2:], pieces[0])
    assert torch.equal(ragged[1:] * 1, pieces[1])
    assert repr(ragged) == "RaggedStates([2, 2, 5, 4], of 2 sequences)"


def test_a_mask_of_another_kind_is_taken_with_the_padded_tensor() -> None:
    pieces = [torch.randn(1, 2, length, 4) for length in (3, 5)]
    ragged = RaggedStates(pieces, [slice(0, 1), slice(1, 2)])
    query = torch.randn(2, 2, 1, 4)
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., :2] = -torch.inf
    with torch.no_grad():
        found, _ = attend(torch.nn.Module(), query, ragged, ragged, mask)
        alike, _ = attend(torch.nn.Module(), query, ragged, ragged, mask == 0)

    assert torch.allclose(found, alike, atol=1e-6)


@pytest.mark.parametrize("model_type", ["falcon", "bloom", "mamba"])
def test_who_attends_otherwise_is_left_alone(model_type: str) -> None:
    trunk = load_ends(model_type)[1]
    before = trunk.config._attn_implementation

    assert attend_in_place(trunk) is attends_in_place(trunk) is (before == NAME)
    assert trunk.config._attn_implementation == before


def test_what_is_no_part_is_left_alone() -> None:
    assert not attend_in_place(torch.nn.Linear(1, 1))
    assert not attends_in_place(object())


def _prompt(trunk: SplitModel, given: HiddenState) -> PartCache:
    cache = trunk.new_cache()
    assert isinstance(cache, PartCache)
    trunk(given.handed_on, past_key_values=cache)
    return cache
