"""Memory that fills: what of it is taken, in which pages, and that it goes back."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import lazy_memory as module
from splitlearn_core.lazy_memory import LazyMemory, lazy_memory
from splitlearn_core.page_sizes import HUGE, PAGE, huge_pages_of, memory_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="such mappings are Linux's")


def anonymous(name: str = "RssAnon") -> int:
    """Return the bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@pytest.mark.parametrize(
    ("nbytes", "pages", "memory"),
    [
        (0, 0, 0),
        (1, 0, PAGE),
        (HUGE // 2 - 1, 0, HUGE // 2),
        (HUGE // 2, 1, HUGE),
        (HUGE + 1, 1, HUGE + PAGE),
        (HUGE + HUGE // 2, 2, 2 * HUGE),
    ],
)
def test_a_huge_page_is_taken_once_it_is_half_full(nbytes: int, pages: int, memory: int) -> None:
    assert huge_pages_of(nbytes) == pages
    assert memory_of(nbytes) == memory


def test_it_is_taken_as_it_is_filled_and_given_back() -> None:
    mappings, before = module._Mapping.live, anonymous()
    memory = lazy_memory(1 << 30, CPU)
    assert memory is not None
    assert memory.bytes.shape == (1 << 30,)
    assert memory.bytes.data_ptr() % HUGE == 0
    assert memory.taken == 0
    for end in (1, 3 * PAGE, HUGE // 2, HUGE, 8 * HUGE + 5):
        memory.fill(end)
        memory.bytes[:end] = 1
        assert memory.taken == memory_of(end)
        assert 0 <= anonymous() - before - memory.taken < 2 << 20
    memory.fill(3)
    assert memory.taken == memory_of(8 * HUGE + 5)
    assert module._Mapping.live == mappings + 1

    view = memory.bytes[HUGE : HUGE + 3]
    del memory
    assert view.tolist() == [1, 1, 1]
    del view
    assert anonymous() - before < 2 << 20
    assert module._Mapping.live == mappings


def test_what_was_in_small_pages_is_in_a_huge_one_once_it_is_half_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    real = mmap.mmap.madvise

    def madvise(self: Any, option: int, *span: int) -> None:
        asked.append((option, *span))
        real(self, option, *span)

    monkeypatch.setattr(module._Mapping, "madvise", madvise)
    memory = LazyMemory(8 * HUGE)
    whole = torch.frombuffer(memory._mapping, dtype=torch.uint8)
    start = memory.bytes.data_ptr() - whole.data_ptr()
    memory.fill(PAGE)
    memory.bytes[:PAGE] = 7
    memory.fill(3 * HUGE)
    memory.fill(3 * HUGE + 1)

    assert asked == [
        (mmap.MADV_NOHUGEPAGE,),
        (mmap.MADV_HUGEPAGE, start, 3 * HUGE),
        (module.COLLAPSE, start, HUGE),
    ]
    assert memory.bytes[:PAGE].eq(7).all()
    assert not memory.bytes[PAGE : 3 * HUGE].any()


def test_a_system_without_huge_pages_fills_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("invalid argument")

    memory = LazyMemory(4 * HUGE)
    monkeypatch.setattr(module._Mapping, "madvise", refuse)
    memory.fill(3 * HUGE)
    memory.bytes[: 3 * HUGE] = 1
    assert memory.bytes.sum() == 3 * HUGE


def test_there_is_none_elsewhere() -> None:
    assert lazy_memory(PAGE, torch.device("meta")) is None
    assert lazy_memory(0, CPU) is None
