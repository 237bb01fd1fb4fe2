"""A layer that grows in place holds what transformers' own would hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from splitlearn_core.growing_layer import BLOCK, GrowingLayer


def states(new: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, new, 4), torch.randn(rows, 3, new, 4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "reset": lambda layer: layer.reset(),
    "crop all": lambda layer: layer.crop(-3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_other_would(change: str) -> None:
    own, other = GrowingLayer(), DynamicLayer()
    rows = {"repeat": 4, "select": 1}.get(change, 2)
    with torch.inference_mode():
        first = states(3)
        for layer in (own, other):
            layer.update(*first)
            CHANGES[change](layer)
        for new in (1, BLOCK - 3, 1, 1, 2 * BLOCK, 1):
            more = states(new, rows)
            found, wanted = own.update(*more), other.update(*more)
            assert all(map(torch.equal, found, wanted))
            assert own.get_seq_length() == other.get_seq_length()
            assert own.get_mask_sizes(1) == other.get_mask_sizes(1)


def test_a_step_does_not_copy_what_is_there() -> None:
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(3))
        before = layer.keys.data_ptr()
        for _ in range(BLOCK - 3):
            layer.update(*states(1))
        assert layer.keys.data_ptr() == before
        layer.update(*states(1))

    assert layer.keys.data_ptr() != before
    assert layer.keys.untyped_storage().nbytes() == 2 * BLOCK * 2 * 3 * 4 * 4


def test_what_was_seen_before_a_crop_is_not_overwritten_by_gradients() -> None:
    """Where gradients are recorded, nothing that a forward has used may change."""
    layer = GrowingLayer()
    weights = torch.ones(2, 3, 3, 4, requires_grad=True)
    keys, values = states(3)
    first, _ = layer.update(keys * weights, values)
    second, _ = layer.update(*states(1))

    (first.square().sum() + second.square().sum()).backward()

    assert torch.allclose(weights.grad, 4 * keys.square(), atol=1e-5)
