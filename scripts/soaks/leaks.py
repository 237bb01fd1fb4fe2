"""Loads and unloads of a real part at full length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from leaks import Cycle, cycles, wrong_with

_MB = 10**6
_TENTH = 10


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Load and unload `count` times in one process, and compare the end with the tenth time."""
    del seed  # nothing here is left to chance
    found: list[Cycle] = []
    with tempfile.TemporaryDirectory() as folder:
        for cycle in cycles(Path(folder), max(count, _TENTH + 3)):
            found.append(cycle)
            if len(found) in {1, _TENTH} or len(found) % 100 == 0:
                print(f"{len(found)}: {_said(cycle)}", flush=True)
            if len(found) < count:
                yield f"cycle {len(found)}: {_said(cycle)}", ""
    yield f"{len(found)} cycles: {_said(found[-1])}", wrong_with(found)


def _said(cycle: Cycle) -> str:
    return (
        f"{cycle.resident / _MB:.1f} MB resident, {cycle.loaded / _MB:.1f} while loaded,"
        f" {cycle.descriptors} descriptors, {cycle.threads} threads"
    )
