"""A layer that grows in place holds what transformers' own would hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from splitlearn_core import lazy_memory
from splitlearn_core.growing_layer import BLOCK, GrowingLayer
from splitlearn_core.lazy_memory import PAGE, lazy_empty

NARROW, WIDE = 4, 64
"""Sizes of heads: of one whose blocks are smaller than a page, and of one whose are not."""


def states(new: int, rows: int = 2, size: int = NARROW) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, new, size), torch.randn(rows, 3, new, size)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "reset": lambda layer: layer.reset(),
    "crop all": lambda layer: layer.crop(-3),
}


@pytest.mark.parametrize("size", [NARROW, WIDE])
@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_other_would(change: str, size: int) -> None:
    own, other = GrowingLayer(), DynamicLayer()
    rows = {"repeat": 4, "select": 1}.get(change, 2)
    with torch.inference_mode():
        first = states(3, size=size)
        for layer in (own, other):
            layer.update(*first)
            CHANGES[change](layer)
        for new in (1, BLOCK - 3, 1, 1, 2 * BLOCK, 1, 10 * BLOCK, 1):
            more = states(new, rows, size)
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


def test_wide_heads_stay_where_they_are_and_take_memory_as_they_fill() -> None:
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(3, size=WIDE))
        before = layer.keys.data_ptr()
        layer.update(*states(500, size=WIDE))
        assert layer.keys.data_ptr() == before
        assert sum(layer.memory().values()) == 2 * 8 * BLOCK * 2 * 3 * WIDE * 4
        layer.crop(-400)
        layer.update(*states(1, size=WIDE))
        assert (layer.keys.data_ptr(), layer.keys.shape[-2]) == (before, 104)
        assert sum(layer.memory().values()) == 2 * 8 * BLOCK * 2 * 3 * WIDE * 4
        layer.update(*states(500, size=WIDE))
        assert layer.keys.data_ptr() != before


@pytest.mark.parametrize("fault", ["too many", "no such memory", "no room"])
def test_where_there_is_no_lazy_memory_wide_heads_grow_by_blocks(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("no room")

    match fault:
        case "too many":
            monkeypatch.setattr(lazy_memory, "_MOST", 0)
        case "no such memory":
            monkeypatch.setattr(lazy_memory, "_CAN", False)
        case _:
            fail.live = 0  # type: ignore[attr-defined]
            monkeypatch.setattr(lazy_memory, "_Mapping", fail)
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(BLOCK + 1, size=WIDE))

    assert layer.keys.untyped_storage().nbytes() == 2 * BLOCK * 2 * 3 * WIDE * 4


def test_lazy_memory_is_taken_page_by_page_and_given_back() -> None:
    mappings, before = lazy_memory._Mapping.live, _anonymous()
    tensor = lazy_empty((64, 1024, 1024), torch.empty(0))
    assert tensor is not None
    assert (tensor.shape, tensor.dtype) == ((64, 1024, 1024), torch.float32)
    assert _anonymous() - before < 4 << 20

    tensor[3] = 1
    assert 0 <= _anonymous() - before - (4 << 20) < 4 << 20
    assert lazy_memory._Mapping.live == mappings + 1
    view = tensor[3, :2]
    del tensor
    assert view.sum() == 2048
    del view

    assert _anonymous() - before < 4 << 20
    assert lazy_memory._Mapping.live == mappings


def test_a_block_of_a_narrow_head_is_smaller_than_a_page() -> None:
    assert BLOCK * NARROW * 4 < PAGE <= BLOCK * WIDE * 4


def _anonymous() -> int:
    """Return the bytes of anonymous memory of this process."""
    with open("/proc/self/status", encoding="utf-8") as status:  # noqa: PTH123 - as proc(5) has it
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_what_was_seen_before_a_crop_is_not_overwritten_by_gradients() -> None:
    """Where gradients are recorded, nothing that a forward has used may change."""
    layer = GrowingLayer()
    weights = torch.ones(2, 3, 3, 4, requires_grad=True)
    keys, values = states(3)
    first, _ = layer.update(keys * weights, values)
    second, _ = layer.update(*states(1))

    (first.square().sum() + second.square().sum()).backward()

    assert torch.allclose(weights.grad, 4 * keys.square(), atol=1e-5)
