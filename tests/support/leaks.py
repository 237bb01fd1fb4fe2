"""What a process holds after many loads and unloads of one part, beside what it held at first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.bench.checkpoints import BenchCheckpoint, Shape

PART_100MB = Shape(
    "leaks",
    "qwen2",
    {
        "vocab_size": 512,
        "hidden_size": 1024,
        "intermediate_size": 3200,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
)
"""Layers 1 and 2, cast to float32, are 99 MB: memory that is anonymous, not mapped."""

_CHILD = Path(__file__).with_name("leak_child.py")
_SETTLED = 10
_MB = 10**6


@dataclass(frozen=True)
class Cycle:
    """What a process held after one load and unload.

    Attributes:
        back: Whether the unload said that all memory is back.
        loaded: Resident bytes before it.
        resident: … and after it.
        descriptors: Open files.
        threads: Python's threads.
        mapped: Whether a weights file is still mapped.
    """

    back: bool
    loaded: int
    resident: int
    descriptors: int
    threads: int
    mapped: bool


def cycles(folder: Path, count: int, *options: str) -> Iterator[Cycle]:
    """Load and unload so many times in a fresh process, and yield what it holds after each."""
    checkpoint = BenchCheckpoint(PART_100MB, 1, folder)
    checkpoint.make()
    command = [sys.executable, str(_CHILD), str(checkpoint.folder), str(count), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Cycle(**json.loads(line))
    if process.returncode:
        raise RuntimeError(f"the process ended with {process.returncode}")


def wrong_with(all_cycles: list[Cycle]) -> str:
    """Return what leaked since the tenth cycle; the last three are looked at, for their least."""
    settled, last = all_cycles[_SETTLED - 1], all_cycles[-3:]
    grown = min(cycle.resident for cycle in last) - settled.resident
    wrong = []
    if grown > max(20 * _MB, 0.02 * settled.resident):
        wrong.append(f"{grown / _MB:.1f} MB more are resident than after the tenth cycle")
    if last[-1].descriptors > settled.descriptors:
        wrong.append(f"{settled.descriptors} descriptors became {last[-1].descriptors}")
    if last[-1].threads > settled.threads:
        wrong.append(f"{settled.threads} threads became {last[-1].threads}")
    if not all(cycle.back for cycle in all_cycles):
        wrong.append("an unload said that memory is not back")
    if any(cycle.mapped for cycle in all_cycles):
        wrong.append("a weights file stayed mapped")
    if settled.loaded - settled.resident < 80 * _MB:
        wrong.append(f"an unload gave back {(settled.loaded - settled.resident) / _MB:.0f} MB only")
    return "; ".join(wrong)
