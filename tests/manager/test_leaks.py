"""A slice of `scripts/soak leaks`."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from leaks import Cycle, cycles, wrong_with

from splitlearn_core.machine import keep_freed_blocks, map_large_blocks

if TYPE_CHECKING:
    from pathlib import Path


def test_loads_and_unloads_leave_nothing_behind(tmp_path: Path) -> None:
    found = list(cycles(tmp_path, 25))

    assert len(found) == 25
    assert wrong_with(found) == ""


def test_a_leak_is_seen() -> None:
    sound = [Cycle(True, 300 * 10**6, 200 * 10**6, 20, 5, mapped=False)] * 20
    assert wrong_with(sound) == ""

    for change, words in (
        ({"resident": 221 * 10**6}, "21.0 MB more are resident"),
        ({"descriptors": 21}, "20 descriptors became 21"),
        ({"threads": 6}, "5 threads became 6"),
        ({"back": False}, "an unload said that memory is not back"),
        ({"mapped": True}, "a weights file stayed mapped"),
    ):
        assert words in wrong_with([*sound, *[replace(sound[0], **change)] * 3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2"),
    ],
)
def test_what_the_environment_says_of_the_allocator_holds(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    assert map_large_blocks() is False
    assert keep_freed_blocks() is False


def test_without_glibc_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())

    assert map_large_blocks() is False
    assert keep_freed_blocks() is False


def test_both_ways_are_known_to_glibc() -> None:
    script = "from splitlearn_core.machine import *; print(map_large_blocks(), keep_freed_blocks())"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    glibc = platform.libc_ver()[0] == "glibc"
    assert said.stdout.split() == [str(glibc)] * 2
