"""Whether sequences that share forwards get what they would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny_models import VOCABULARY, tiny_model

from splitlearn_core import SplitModel
from splitlearn_core.cache import PartCache
from splitlearn_core.factory import load_component
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import JoinedCache, joinable, joinable_cache
from splitlearn_core.packed_cache import PackedCache
from splitlearn_core.session_attention import attend_in_place, attends_in_place

CUT = (2, 4)
LENGTHS = (5, 9, 1, 13)
ROWS = (1, 2, 1, 1)
STEPS = 3
# float32; what padding changes is the order of sums
TOLERANCE = 2e-6


def load_ends(model_type: str) -> tuple[SplitModel, SplitModel]:
    """Return Bottom and Trunk of a small model."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        tiny_model(model_type).save_pretrained(folder)
        bottom = load_component(Path(folder), "bottom", CUT)
        return bottom, load_component(Path(folder), "trunk", CUT)


def hidden_states(bottom: SplitModel) -> list[list[HiddenState]]:
    """Return, for each sequence, what Bottom gives: for its prompt, and for `STEPS` tokens more."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length, rows in zip(LENGTHS, ROWS, strict=True):
        ids = torch.randint(3, VOCABULARY, (rows, length + STEPS), generator=generator)
        pieces = [ids[:, :length], *ids[:, length:].split(1, dim=1)]
        cache = bottom.new_cache()
        found.append([HiddenState.of(bottom(piece, past_key_values=cache)) for piece in pieces])
    return found


def alone(trunk: SplitModel, inputs: Sequence[HiddenState]) -> list[torch.Tensor]:
    """Return what a sequence gets by itself."""
    cache = trunk.new_cache()
    outputs, past = [], 0
    for given in inputs:
        rows, new = given.shape[:2]
        positions = torch.arange(past, past + new).expand(rows, -1)
        output = trunk(given.handed_on, position_ids=positions, past_key_values=cache)
        outputs.append(HiddenState.of(output).tensor)
        past += new
    return outputs


def together(trunk: SplitModel, inputs: Sequence[Sequence[HiddenState]]) -> list[torch.Tensor]:
    """Return what all sequences get, step by step, from forwards that they share."""
    caches = []
    for sequence in inputs:
        cache = trunk.new_cache()
        assert isinstance(cache, PartCache)
        trunk(sequence[0].handed_on, past_key_values=cache)
        caches.append(cache)
    return [step(trunk, caches, [s[number] for s in inputs]) for number in range(1, STEPS + 1)]


def step(
    trunk: SplitModel, caches: Sequence[PartCache], inputs: Sequence[HiddenState]
) -> torch.Tensor:
    """Run one forward for all, and return what it gives."""
    joined = JoinedCache(caches, in_place=attends_in_place(trunk))
    side = {name: torch.cat([one.side[name] for one in inputs]) for name in inputs[0].side}
    given = HiddenState(torch.cat([one.tensor for one in inputs]), side)
    mask = joined.mask(1) if joinable(trunk).mask else None
    output = trunk(
        given.handed_on,
        attention_mask=mask,
        position_ids=joined.position_ids(1),
        past_key_values=joined,
    )
    joined.commit()
    return HiddenState.of(output).tensor


TURNS = ((0, 1), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3), (0, 2, 3), (0, 1, 2, 3), (1, 3))
PIECE = 4
"""Which sequences are in each packed forward, and of how many positions at most."""


def packed(trunk: SplitModel, inputs: Sequence[Sequence[HiddenState]]) -> list[torch.Tensor]:
    """Return what each sequence gets, all its positions, in forwards of packed pieces."""
    caches = [joinable_cache(trunk) for _ in inputs]
    left = [HiddenState.joined(list(sequence), dim=1) for sequence in inputs]
    got: list[list[torch.Tensor]] = [[] for _ in inputs]
    turns = [*TURNS, *([tuple(range(len(inputs)))] * 10)]
    for turn in turns:
        who = [number for number in turn if left[number].new]
        if not who:
            break
        sizes = [(left[n].shape[0], min(PIECE + n % 2, left[n].new)) for n in who]
        joined = PackedCache([caches[n] for n in who], sizes)
        given = [left[n].between(0, new) for n, (_, new) in zip(who, sizes, strict=True)]
        output = trunk(
            joined.pack(given).handed_on,
            attention_mask=joined.mask,
            position_ids=joined.position_ids(),
            past_key_values=joined,
        )
        joined.commit()
        for n, found in zip(who, joined.unpack(HiddenState.of(output)), strict=True):
            got[n].append(found.tensor)
            left[n] = left[n].between(found.new, left[n].new)
    assert not any(one.new for one in left)
    return [torch.cat(pieces, dim=1) for pieces in got]


def packed_difference(model_type: str) -> float | None:
    """Return how far sequences that are packed are from those that run alone, at most.

    Returns:
        Relative to the largest number; `None` where they can't be packed.
    """
    bottom, trunk = load_ends(model_type)
    attend_in_place(trunk)
    if not joinable(trunk).packed:
        return None
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        expected = [torch.cat(alone(trunk, sequence), dim=1) for sequence in inputs]
        found = packed(trunk, inputs)
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


def largest_difference(model_type: str) -> float | None:
    """Return how far sequences that share forwards are from those that don't, at most.

    Returns:
        Relative to the largest number, padded and in place; `None` where they can't share.
    """
    bottom, trunk = load_ends(model_type)
    if not joinable(trunk).steps:
        return None
    with torch.inference_mode():
        inputs = hidden_states(bottom)
        expected = [alone(trunk, sequence) for sequence in inputs]
        produced = together(trunk, inputs)
        if attend_in_place(trunk):
            for sequence, wanted in zip(inputs, expected, strict=True):
                assert all(map(torch.equal, alone(trunk, sequence), wanted))
            produced += together(trunk, inputs)
    worst = 0.0
    for number, output in enumerate(produced):
        wanted = torch.cat([one[1 + number % STEPS] for one in expected])
        worst = max(worst, float((output - wanted).abs().max() / wanted.abs().max()))
    return worst
