"""Memory in huge pages: what is in it, when it goes, and where there are none."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import huge_pages
from splitlearn_core.factory import load_component
from splitlearn_core.huge_pages import HugeArena, collapse, huge_empty
from splitlearn_core.page_sizes import HUGE

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="madvise(2) is Linux's")


def smaps(address: int) -> dict[str, int]:
    """Return what the system says of the mapping that an address is in, in KiB."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        first, *rest = line.split()
        if first.endswith(":"):
            if inside and rest[-1:] == ["kB"]:
                found[first[:-1]] = int(rest[0])
            elif inside and first == "VmFlags:":
                found |= dict.fromkeys(rest, 1)
        else:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
    return found


def test_tensors_are_apart_aligned_and_of_their_dtype() -> None:
    arena = HugeArena()
    shapes = [
        ((3, 5), torch.bfloat16),
        ((7,), torch.float32),
        ((), torch.int64),
        ((2, 0), torch.half),
    ]

    tensors = [arena.empty(shape, dtype) for shape, dtype in shapes]

    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    for number, ((shape, dtype), tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == number + 1).all())


def test_one_that_is_larger_than_a_mapping_has_its_own() -> None:
    arena = HugeArena()
    small = arena.empty((4,), torch.float32).fill_(1)

    large = arena.empty((10 << 20,), torch.float32)
    large[-1] = 2

    assert large.numel() == 10 << 20
    assert float(large[-1]) == 2
    assert small.tolist() == [1, 1, 1, 1]


@on_linux
def test_the_system_is_asked_for_huge_pages_and_has_them_back() -> None:
    tensor = HugeArena().empty((2 * HUGE,), torch.uint8).fill_(1)
    address = tensor.data_ptr()
    assert address % HUGE == 0
    assert smaps(address)["hg"]

    del tensor
    gc.collect()

    assert "hg" not in smaps(address)


@on_linux
def test_what_is_in_small_pages_keeps_what_is_in_it() -> None:
    block = mmap.mmap(-1, 6 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(block, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE
    full, holed, empty = (tensor[start + n * HUGE : start + (n + 1) * HUGE] for n in range(3))
    full.copy_(torch.arange(HUGE) % 251)
    holed[:: 2 * mmap.PAGESIZE] = 7
    before = smaps(tensor.data_ptr())["Rss"]

    moved = collapse()

    assert torch.equal(full, (torch.arange(HUGE) % 251).to(torch.uint8))
    assert int(holed.sum()) == 7 * HUGE // (2 * mmap.PAGESIZE)
    assert not moved or smaps(full.data_ptr())["AnonHugePages"] >= HUGE >> 10
    assert smaps(full.data_ptr())["Rss"] == before  # the holes were not filled
    assert not int(empty.sum())


@on_linux
def test_memory_set_apart_for_small_pages_is_left_alone() -> None:
    block = mmap.mmap(-1, 3 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)
    tensor = torch.frombuffer(block, dtype=torch.uint8).fill_(3)

    collapse()

    assert smaps(tensor.data_ptr())["AnonHugePages"] == 0


def test_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_CAN", False)

    assert HugeArena().empty((2, 3), torch.float16).shape == (2, 3)
    assert huge_empty(10).dtype == torch.uint8
    assert collapse() == 0


def test_a_kernel_without_them_gives_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)

    assert int(huge_empty(5).fill_(2).sum()) == 10


def test_no_room_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="the system has no"):
        huge_empty(1 << 60)


@on_linux
@pytest.mark.parametrize("options", [{"mmap": False}, {"dtype": "float64"}])
def test_private_weights_of_a_part_are_in_them(
    make_checkpoint: Callable[..., Any], options: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint("llama").path
    mapped = load_component(checkpoint, "trunk", [2, 4])

    private = load_component(checkpoint, "trunk", [2, 4], **options)

    for (name, weight), (_, plain) in zip(
        private.named_parameters(), mapped.named_parameters(), strict=True
    ):
        assert torch.equal(weight, plain.to(weight.dtype)), name
        assert smaps(weight.data_ptr())["hg"], name


@on_linux
def test_packed_weights_are_moved_there(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Kernel:
        mincore = huge_pages.libc().mincore

        @staticmethod
        def madvise(*arguments: int) -> int:
            asked.append(arguments[-1])
            return 0

    monkeypatch.setattr(huge_pages, "libc", Kernel)

    load_component(make_checkpoint("llama").path, "trunk", [2, 4])
    assert not asked

    load_component(make_checkpoint("llama").path, "trunk", [2, 4], quantization="prepacked")
    assert set(asked) == {25}  # MADV_COLLAPSE
