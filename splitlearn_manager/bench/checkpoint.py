"""What saving and loading training state takes, beside a plain sequential write and read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from splitlearn_manager.bench import checkpoints
from splitlearn_manager.bench.checkpoints import BenchCheckpoint, Shape
from splitlearn_manager.bench.process import Child, started
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.workbench import check_room

logger = logging.getLogger(__name__)

_CHILD = "splitlearn_manager.bench.checkpoint_child"
_END = "end"
_MB = 1e6
# As promised: of a plain write's rate; beside the largest tensor; of the state; of the save.
_SHARE_OF_RATE = 0.8
_SPARE_BYTES = 64e6
_SHARE_OF_STATE = 1.05
_SHARE_OF_SAVE = 0.25
# The old checkpoint, the new one, and the plain file.
_COPIES = 3


@dataclass(frozen=True)
class _Scale:
    """How much is measured: whose shape the state has, how often, and whether it is promised."""

    shape: Shape
    rounds: int
    promised: bool

    def target(self, value: float) -> float | None:
        """Return a target, where the size is the one that it was promised for."""
        return value if self.promised else None


_FULL = _Scale(checkpoints.QWEN2_0_5B, 7, promised=True)
_QUICK = _Scale(checkpoints.QWEN2_TINY, 2, promised=False)


@dataclass(frozen=True)
class _Taken:
    """One way in one round.

    Attributes:
        seconds: Until all was done.
        waited: Until the caller could go on.
        extra: Most anonymous bytes at any time, beyond what the process had before; in the
            background before the first save, whose copy is kept.
    """

    seconds: float
    waited: float
    extra: int


_Rounds = dict[str, list[_Taken]]


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make a state of a real model's shapes, and measure; every way has its turn in each round.

    Args:
        work_dir: Where is written and read; nothing stays there.
        groups: Which of `ROWS`.
        quick: Whether to take a tiny state, without targets.

    Raises:
        BenchError: There is no room on the disk, or the measured process failed.
    """
    scale = _QUICK if quick else _FULL
    state = BenchCheckpoint(scale.shape, 1, work_dir)
    check_room(work_dir, _COPIES * state.nbytes)
    rounds = _measure(scale, work_dir)
    return Report.here(row for group in groups for row in ROWS[group](rounds, state, scale))


def _measure(scale: _Scale, work_dir: Path) -> _Rounds:
    """Let a fresh process take every way in turns."""
    rounds: _Rounds = {way: [] for way in WAYS}
    line = json.dumps({"shape": scale.shape.name, "folder": str(work_dir)})
    with started(_CHILD, line) as child:
        child.answer()
        first = child.anonymous()
        for number in range(scale.rounds):
            for way in _turn(number):
                before = first if way == "background" else child.anonymous()
                rounds[way].append(_take(child, way, before))
                logger.info("%s, round %d: %.2f s", way, number + 1, rounds[way][-1].seconds)
        child.go(_END)
    return rounds


def _turn(number: int) -> Iterator[str]:
    """Yield the ways, each round beginning with another one."""
    yield from (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)])


def _take(child: Child, way: str, before: int) -> _Taken:
    answer, peak = child.go(way)
    return _Taken(answer["seconds"], answer["waited"], max(0, peak - before))


def _rate(taken: list[_Taken], nbytes: int) -> float:
    return nbytes / _MB / median(t.seconds for t in taken)


def _save_rows(rounds: _Rounds, state: BenchCheckpoint, scale: _Scale) -> Iterator[Row]:
    name = _name(state)
    plain = _rate(rounds["write"], state.nbytes)
    note = f"median of {scale.rounds} rounds; with hashes, a manifest and synced folders"
    saved = _rate(rounds["save"], state.nbytes)
    target = scale.target(_SHARE_OF_RATE * plain)
    yield Row(f"{name} saved: rate", saved, "MB/s", ">=", target, plain, note)
    largest = max(spec.nbytes for spec in state.tensors.values())
    room = scale.target((largest + _SPARE_BYTES) / _MB)
    extra = max(t.extra for t in rounds["save"]) / _MB
    note = f"the largest tensor has {largest / _MB:.1f} MB"
    yield Row(f"{name} saved: peak extra anonymous memory", extra, "MB", "<=", room, None, note)


def _background_rows(rounds: _Rounds, state: BenchCheckpoint, scale: _Scale) -> Iterator[Row]:
    name = f"{_name(state)} saved in the background"
    first, later = rounds["background"][0], rounds["background"][1:] or rounds["background"]
    extra = max(t.extra for t in rounds["background"]) / state.nbytes
    yield Row(
        f"{name}: extra anonymous memory, of the state",
        extra, "", "<=", scale.target(_SHARE_OF_STATE),
    )  # fmt: skip
    share = scale.target(_SHARE_OF_SAVE)
    note = "until save() returns, of all until the checkpoint is on the disk; nothing else runs"
    waited = median(t.waited / t.seconds for t in later)
    yield Row(f"{name}: training waits, of the save", waited, "", "<=", share, None, note)
    note = "this one must find memory for the copy, which later ones use again"
    waited = first.waited / first.seconds
    yield Row(f"{name}, the first time: training waits", waited, "", "<=", None, None, note)
    seconds = median(t.waited for t in later)
    foreground = median(t.seconds for t in rounds["save"])
    note = "compared with a save that is waited for"
    yield Row(f"{name}: training waits", seconds, "s", "<=", None, foreground, note)


def _load_rows(rounds: _Rounds, state: BenchCheckpoint, scale: _Scale) -> Iterator[Row]:
    note = f"median of {scale.rounds} rounds, files in the page cache; every hash compared"
    loaded, plain = (_rate(rounds[way], state.nbytes) for way in ("load", "read"))
    yield Row(f"{_name(state)} loaded: rate", loaded, "MB/s", ">=", None, plain, note)


def _name(state: BenchCheckpoint) -> str:
    return f"{state.nbytes / 1e9:.2f} GB of {state.shape.name}"


WAYS = ("write", "save", "read", "load", "background")
"""What has its turn in each round."""

ROWS: dict[str, Callable[[_Rounds, BenchCheckpoint, _Scale], Iterator[Row]]] = {
    "save": _save_rows,
    "background": _background_rows,
    "load": _load_rows,
}
"""What `--rows` can name -> what makes it of the rounds."""
