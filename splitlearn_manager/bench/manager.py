"""What the manager costs: its lock, its event loop while a part loads, a call, a list."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from splitlearn_manager.bench import page_cache
from splitlearn_manager.bench.checkpoints import QWEN2_TINY, BenchCheckpoint
from splitlearn_manager.bench.process import figures_of
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.workbench import Workbench, full_scale, quick_scale

logger = logging.getLogger(__name__)

_CHILD = "splitlearn_manager.bench.manager_child"
_FLOAT32 = "float32"
_MS = 1e3
_US = 1e6
_GB = 1e9

_MODELS = 100
_LISTED = 1000
_LOCK_TURNS = 20
_CALLS = 2000
_LISTS = 50
_QUICK_SHARE = 10


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make the checkpoints that are needed, and measure.

    Args:
        work_dir: Holds the checkpoints, which stay there for the next run.
        groups: Which of `ROWS`.
        quick: Whether to take small numbers and no targets.

    Raises:
        BenchError: There is no room on the disk, or a measured process failed.
    """
    bench = Workbench((quick_scale if quick else full_scale)(work_dir), work_dir)
    bench.prepare([bench.scale.small] if "lag" in groups else [])
    rows: list[Row] = []
    for group in groups:
        logger.info("measuring %s", group)
        rows += ROWS[group](bench)
    return Report.here(rows)


def _lock(bench: Workbench) -> list[Row]:
    """Return the rows of the manager's lock."""
    runs = _measure(bench, "lock", models=_few(bench, _MODELS), times=_few(bench, _LOCK_TURNS))
    note = (
        f"{runs[0]['count']:,.0f} holds a run: loads, reloads and evictions among"
        f" {_few(bench, _MODELS)} models, all at once; median of {len(runs)} fresh processes"
    )
    return [
        Row("lock held: p99", _of(runs, "p99") * _MS, "ms", "<=", bench.target(1), note=note),
        Row("lock held: longest", _of(runs, "max") * _MS, "ms", "<="),
    ]


def _lag(bench: Workbench) -> list[Row]:
    """Return the rows of the event loop while a part loads."""
    small = bench.scale.small
    page_cache.warm(small.files)
    tiny = BenchCheckpoint(QWEN2_TINY, 1, bench.work_dir)
    runs = _measure(
        bench,
        "lag",
        model=str(small.folder),
        small=str(tiny.folder),
        points=list(bench.scale.points),
        dtype=_FLOAT32,
    )
    nbytes, seconds = runs[0]["nbytes"], _of(runs, "seconds")
    name = f"event loop late while {bench.trunk} loads, cast to float32"
    note = (
        f"{nbytes / _GB:.2f} GB in {seconds:.1f} s, imports done, file in the page cache; compared"
        f" with an idle loop; median of {len(runs)} fresh processes"
    )
    return [
        Row(
            f"{name}: p99",
            _of(runs, "p99") * _MS,
            "ms",
            "<=",
            bench.target(10),
            _of(runs, "idle_p99") * _MS,
            note,
        ),
        Row(
            f"{name}: longest",
            _of(runs, "max") * _MS,
            "ms",
            "<=",
            bench.target(50),
            _of(runs, "idle_max") * _MS,
        ),
        Row(
            "event loop late while it goes: longest",
            _of(runs, "unload_max") * _MS,
            "ms",
            "<=",
        ),
    ]


def _infer(bench: Workbench) -> list[Row]:
    """Return the row of a call through the manager."""
    tiny = BenchCheckpoint(QWEN2_TINY, 1, bench.work_dir)
    runs = _measure(bench, "infer", model=str(tiny.folder), times=_few(bench, _CALLS))
    return [
        Row(
            f"manager.infer over a bare call, {tiny.shape.name}, one token: p50",
            _of(runs, "overhead") * _US,
            "us",
            "<=",
            bench.target(100),
            _of(runs, "bare") * _US,
            "what a call through the manager takes longer; compared with the bare call itself;"
            f" median of {len(runs)} fresh processes",
        )
    ]


def _list(bench: Workbench) -> list[Row]:
    """Return the row of a list of models."""
    models = _few(bench, _LISTED)
    runs = _measure(bench, "list", models=models, times=_LISTS)
    note = f"median of {_LISTS} times, and of {len(runs)} fresh processes"
    return [Row(f"list of {models:,} models", _of(runs, "median") * _MS, "ms", "<=", note=note)]


def _few(bench: Workbench, number: int) -> int:
    """Return a number, or a share of it where only something is to be seen to run."""
    return number if bench.scale.promised else max(4, number // _QUICK_SHARE)


def _of(runs: list[dict[str, float]], name: str) -> float:
    return median(run[name] for run in runs)


def _measure(bench: Workbench, task: str, **arguments: Any) -> list[dict[str, float]]:
    """Do a task in fresh processes, and return the figures of each."""
    runs = []
    for number in range(bench.scale.runs):
        runs.append(figures_of(_CHILD, task, **arguments))
        logger.info("%s, run %d: %s", task, number + 1, runs[-1])
    return runs


ROWS: dict[str, Callable[[Workbench], list[Row]]] = {
    "lock": _lock,
    "lag": _lag,
    "infer": _infer,
    "list": _list,
}
"""What `--rows` can name -> what measures it."""
