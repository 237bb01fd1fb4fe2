"""A layer that grows in place holds what transformers' own would hold."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from splitlearn_core import cache_room, lazy_memory
from splitlearn_core.growing_layer import BLOCK, GrowingLayer, share_room
from splitlearn_core.page_sizes import memory_of

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="such mappings are Linux's")

POSITION = 2 * 2 * 3 * 4 * 4
"""Bytes of a position of `states` in one layer."""


def states(new: int, rows: int = 2, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, new, size), torch.randn(rows, 3, new, size)


@pytest.fixture(params=["a room", "blocks"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where layers keep what they hold."""
    found: str = request.param
    if found == "blocks":
        monkeypatch.setattr(lazy_memory, "_CAN", False)
    elif not lazy_memory._CAN:
        pytest.skip("mappings that fill by themselves are Linux's")
    return found


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "reset": lambda layer: layer.reset(),
    "crop all": lambda layer: layer.crop(-3),
}


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_the_other_would(change: str) -> None:
    own, other = GrowingLayer(), DynamicLayer()
    rows = {"repeat": 4, "select": 1}.get(change, 2)
    with torch.inference_mode():
        first = states(3)
        for layer in (own, other):
            layer.update(*first)
            CHANGES[change](layer)
        for new in (1, BLOCK - 3, 1, 1, 2 * BLOCK, 1, 10 * BLOCK, 1):
            more = states(new, rows)
            found, wanted = own.update(*more), other.update(*more)
            assert all(map(torch.equal, found, wanted))
            assert own.get_seq_length() == other.get_seq_length()
            assert own.get_mask_sizes(1) == other.get_mask_sizes(1)


def test_in_blocks_a_step_copies_what_is_there_when_one_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lazy_memory, "_CAN", False)
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


@on_linux
def test_layers_share_a_room_and_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_room, "_SPACES", (600 * 2 * POSITION,))
    layers = [GrowingLayer(), GrowingLayer()]
    share_room(layers)
    held = [DynamicLayer(), DynamicLayer()]
    before = []
    with torch.no_grad():
        for new in (3, 500, 1, 96, 1):
            for layer, other in zip(layers, held, strict=True):
                more = states(new)
                found, wanted = layer.update(*more), other.update(*more)
                assert all(map(torch.equal, found, wanted))
            before.append(layers[0].keys.data_ptr())
            assert layers[1].keys.data_ptr() - before[-1] == POSITION

    assert len(set(before[:4])) == 1
    assert before[4] != before[3]
    assert all(map(torch.equal, [one.keys for one in layers], [one.keys for one in held]))
    taken = [layer.memory() for layer in layers]
    assert taken[0] == taken[1]
    assert list(taken[0].values()) == [memory_of(601 * 2 * POSITION)]


@on_linux
def test_rows_that_change_make_new_room_and_reordered_ones_go_back_where_they_were() -> None:
    layers = [GrowingLayer(), GrowingLayer()]
    share_room(layers)
    with torch.no_grad():
        for layer in layers:
            layer.update(*states(3))
        first = layers[0].keys.data_ptr()
        for layer in layers:
            layer.reorder_cache(torch.tensor([1, 0]))
            layer.update(*states(1))
        assert layers[0].keys.data_ptr() == first
        for layer in layers:
            layer.batch_repeat_interleave(2)
            layer.update(*states(1, rows=4))

    assert layers[0].keys.data_ptr() != first
    ours, others = (layer.keys.untyped_storage().data_ptr() for layer in layers)
    assert ours == others


@on_linux
def test_a_layer_that_is_not_like_the_others_has_memory_of_its_own() -> None:
    layers = [GrowingLayer(), GrowingLayer()]
    share_room(layers)
    other = DynamicLayer()
    with torch.no_grad():
        for new in (3, BLOCK, 1):
            layers[0].update(*states(new))
            more = states(new, size=8)
            assert all(map(torch.equal, layers[1].update(*more), other.update(*more)))

    assert layers[1].memory() == {}
    assert layers[1].keys.untyped_storage().nbytes() == 2 * BLOCK * 2 * 3 * 8 * 4


@on_linux
def test_what_is_in_a_room_may_be_given_back_to_it_at_another_place() -> None:
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(5))
        layer.keys, layer.values = layer.keys[..., 1:, :], layer.values[..., 1:, :]
        wanted = layer.keys.clone()
        layer.update(*states(1))

    assert torch.equal(layer.keys[..., :4, :], wanted)


@pytest.mark.parametrize(
    ("nbytes", "stride"), [(256, 256), (4032, 4032), (4096, 4160), (6144, 6208), (8256, 8256)]
)
def test_positions_of_a_layer_do_not_meet_in_the_processors_cache(nbytes: int, stride: int) -> None:
    assert cache_room._stride(nbytes) == stride


@on_linux
def test_values_of_another_dtype_keep_it() -> None:
    layer = GrowingLayer()
    keys, values = states(3)
    with torch.no_grad():
        layer.update(keys.bfloat16(), values)
    assert torch.equal(layer.values, values)


@on_linux
def test_where_there_is_little_address_space_a_cache_has_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    real = lazy_memory._Mapping

    def limited(nbytes: int) -> Any:
        asked.append(nbytes)
        if nbytes > 2 << 30:
            raise OSError("no room")
        return real(nbytes)

    limited.live = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(lazy_memory, "_Mapping", limited)
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(3))
    assert [nbytes >> 30 for nbytes in asked] == [16, 1]
    assert layer.memory()


@on_linux
def test_a_copy_has_a_room_of_its_own() -> None:
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(3))
        other = copy.deepcopy(layer)
        wanted = other.keys.clone()
        layer.update(*states(1))
        other.update(*states(1))

    assert torch.equal(other.keys[..., :3, :], wanted)
    assert other.keys.untyped_storage().data_ptr() != layer.keys.untyped_storage().data_ptr()
    assert (layer.memory().keys() & other.memory().keys()) == set()


@pytest.mark.parametrize("fault", ["too many", "no such memory", "no room"])
def test_where_there_is_no_lazy_memory_layers_grow_by_blocks(
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
        layer.update(*states(BLOCK + 1))

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
