"""What packed weights gain and cost: time, memory and error, beside the plain ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from splitlearn_manager.bench import checkpoints
from splitlearn_manager.bench.checkpoints import BenchCheckpoint, Shape
from splitlearn_manager.bench.process import figures_of
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.workbench import check_room

logger = logging.getLogger(__name__)

_CHILD = "splitlearn_manager.bench.quantization_child"
_PLAIN = ("float32", "bfloat16")
_MB = 1e6
_MS = 1e3
_PERCENT = 100
_CASES = {"1": "1 token, batch 1", "8": "1 token each, batch 8", "prompt": "prompt of {}"}
_FASTER = "times as fast"


class _Scale(NamedTuple):
    """How much is measured: a Trunk's shape and cuts, and how often; how much of the text."""

    shape: Shape
    points: tuple[int, int]
    positions: int
    rounds: int
    steps: int
    texts: int
    tokens: int


_FULL = _Scale(checkpoints.QWEN2_0_5B_LAYERS, (1, 9), 128, 5, 8, 1000, 24)
_QUICK = _Scale(checkpoints.QWEN2_TINY, (2, 4), 8, 1, 2, 3, 4)


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make the checkpoint that is needed, and measure.

    Args:
        work_dir: Holds the checkpoint, which stays there for the next run.
        groups: Which of `ROWS`.
        quick: Whether to take a tiny model and little text.

    Raises:
        BenchError: There is no room on the disk, or the measured process failed.
    """
    scale = _QUICK if quick else _FULL
    rows: list[Row] = []
    for group in groups:
        logger.info("measuring %s", group)
        rows += ROWS[group](scale, work_dir)
    return Report.here(rows)


def _trunk(scale: _Scale, work_dir: Path) -> list[Row]:
    """Return the rows of a Trunk of real layers with random weights."""
    checkpoint = BenchCheckpoint(scale.shape, 1, work_dir)
    if not checkpoint.is_made():
        check_room(work_dir, checkpoint.nbytes)
        checkpoint.make()
    figures = figures_of(
        _CHILD,
        "trunk",
        model=str(checkpoint.folder),
        points=scale.points,
        positions=scale.positions,
        rounds=scale.rounds,
        steps=scale.steps,
    )
    name = f"Trunk of {scale.points[1] - scale.points[0]} layers of {scale.shape.name}"
    return [row for way in figures for row in _trunk_rows(name, way, figures, scale)]


def _trunk_rows(
    name: str, way: str, figures: dict[str, dict[str, float]], scale: _Scale
) -> Iterator[Row]:
    """Yield the rows of one way; of a plain one only what it is compared by."""
    mine, plain = figures[way], figures[_plain(way)]
    note = (
        f"1 thread; median of {scale.rounds} rounds, in each of"
        f" which every way has its turn in one process; compared with plain {_plain(way)}, and"
        " float32 for the error"
    )
    for case, text in _CASES.items():
        milliseconds = mine[f"{case} seconds"] * _MS
        title = f"{name}, {way}: {text.format(scale.positions)}"
        yield Row(title, milliseconds, "ms", "<=", None, plain[f"{case} seconds"] * _MS, note)
        if way not in _PLAIN:
            yield Row(f"{title}, {_FASTER}", mine[f"{case} faster"], "", ">=", None, 1.0)
    yield Row(
        f"{name}, {way}: weights", mine["nbytes"] / _MB, "MB", "<=", None, plain["nbytes"] / _MB
    )
    if way != _PLAIN[0]:
        yield Row(f"{name}, {way}: relative error of hidden states", mine["error"], "", "<=")


def _demo(scale: _Scale, work_dir: Path) -> list[Row]:
    """Return the rows of the built-in model, which has learned something."""
    del work_dir
    figures = figures_of(_CHILD, "demo", texts=scale.texts, tokens=scale.tokens)
    return [row for way in figures for row in _demo_rows(way, figures, scale)]


def _demo_rows(way: str, figures: dict[str, dict[str, float]], scale: _Scale) -> Iterator[Row]:
    mine, plain = figures[way], figures[_PLAIN[0]]
    note = (
        f"{mine['tokens']:,.0f} predicted tokens of docstrings that the model was not trained on;"
        f" greedy continuations of {scale.tokens} tokens; compared with plain float32"
    )
    name = f"built-in model, {way}"
    yield Row(f"{name}: perplexity", mine["perplexity"], "", "<=", None, plain["perplexity"], note)
    if way == _PLAIN[0]:
        return
    same, generated = mine["same"] * _PERCENT, mine["generated"] * _PERCENT
    yield Row(f"{name}: relative error of logits", mine["error"], "", "<=")
    yield Row(f"{name}: same best token", same, "%", ">=")
    yield Row(f"{name}: same greedy continuation", generated, "%", ">=")


def _plain(way: str) -> str:
    """Return the plain way of the same dtype."""
    return way.rsplit(" ", maxsplit=1)[-1]


ROWS: dict[str, Callable[[_Scale, Path], list[Row]]] = {"trunk": _trunk, "demo": _demo}
"""What `--rows` can name -> what measures it."""
