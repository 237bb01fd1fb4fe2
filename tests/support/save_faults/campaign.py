"""Trials of saving under faults: each is right, or says what is wrong.

Always: the newest checkpoint is the old one or the new one, whole; those before are there; what is
damaged is refused by name, and nothing is loaded of it; the next save works and cleans up.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from save_faults.disks import CountingDisk, FullDisk
from save_faults.states import Holder, save, wrong_with
from splitlearn_core.checkpoint.files.folders import checkpoints_in
from splitlearn_core.checkpoint.resume import Checkpointer
from splitlearn_core.errors import CheckpointError, StorageError

_CHILD = Path(__file__).with_name("child.py")
_SECONDS = 60
# Of the kills, those at a chosen call; the others come at any time of a save that takes so long.
_SHARE_OF_CALLS = 0.5
_LONGEST_SAVE = 0.15
_FIRST, _SECOND, _THIRD = 1, 2, 3

Trial = tuple[str, str]
"""What was tried, and what is wrong with what came of it: nothing, as a rule."""


def run(folder: Path, seed: int, count: int) -> Generator[Trial]:
    """Yield `count` trials, in turns of each kind, and of kills twice as many."""
    kinds = [kills, full_disks, kills, size_limits, damages]
    trials = [
        kind(folder / str(number), random.Random(seed * len(kinds) + number))  # noqa: S311
        for number, kind in enumerate(kinds)
    ]
    for number in range(count):
        yield next(trials[number % len(trials)])
    for trial in trials:
        trial.close()


def _prepared(folder: Path) -> list[str]:
    """Save two checkpoints; return the calls that the third would make of the disk."""
    for step in (_FIRST, _SECOND):
        save(folder, step)
    copy = folder.with_name(folder.name + "-copy")
    shutil.copytree(folder, copy)
    disk = CountingDisk()
    save(copy, _THIRD, disk)
    shutil.rmtree(copy)
    return disk.calls


def _wrong_after(folder: Path) -> str:
    """Say what is wrong after a third save that may have failed at any point."""
    steps = [checkpoint.step for checkpoint in checkpoints_in(folder)]
    if wrong := wrong_with(folder, {_SECOND, _THIRD}):
        return wrong
    if _SECOND not in steps or (_FIRST not in steps and _THIRD not in steps):
        return f"an earlier checkpoint is lost: {steps}"
    if wrong := wrong_with(folder, {_SECOND}, _at(folder, _SECOND)):
        return wrong
    save(folder, _THIRD + 1)
    left = [path.name for path in folder.iterdir() if path.name.startswith((".saving", ".del"))]
    if left:
        return f"the next save left {left}"
    return wrong_with(folder, {_THIRD + 1})


def _at(folder: Path, step: int) -> Path:
    return next(c.path for c in checkpoints_in(folder) if c.step == step)


# --- Kills -------------------------------------------------------------------------------------


def kills(folder: Path, rng: random.Random) -> Generator[Trial]:
    """Kill a save: at a call of the disk, with half of it done, or at any time at all."""
    with _Killer() as killer:
        while True:
            calls = _prepared(folder)
            if rng.random() < _SHARE_OF_CALLS:
                fatal = rng.randrange(len(calls))
                what = f"killed at call {fatal} of {len(calls)}, {calls[fatal]}"
                ended = killer.save(folder, call=fatal)
                assert ended == -signal.SIGKILL, f"{what}: ended with {ended}"
            else:
                seconds = rng.random() * _LONGEST_SAVE
                ended = killer.save(folder, seconds=seconds)
                what = f"killed after {seconds:.3f} s" + ("" if ended else " (too late)")
            yield what, _wrong_after(folder)
            shutil.rmtree(folder)


class _Killer:
    """A process that starts saves and kills them."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(_CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_SECONDS)

    def save(self, folder: Path, *, call: int | None = None, seconds: float | None = None) -> int:
        """Save, and be killed; return how the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), _THIRD, call, seconds]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


# --- Full disks --------------------------------------------------------------------------------


def full_disks(folder: Path, rng: random.Random) -> Generator[Trial]:
    """Let the disk be full from a call on: from each in turn, beginning anywhere."""
    for number in itertools.count(rng.randrange(1000)):
        calls = _prepared(folder)
        yield full_at(folder, number % len(calls), calls)
        shutil.rmtree(folder)


def full_at(folder: Path, fatal: int, calls: list[str]) -> Trial:
    """Let the disk be full from this call on; two checkpoints are there."""
    what = f"full at call {fatal} of {len(calls)}, {calls[fatal]}"
    try:
        save(folder, _THIRD, FullDisk(fatal))
    except StorageError as error:
        wrong = "" if str(folder) in str(error) and "Make room" in str(error) else str(error)
        if "older ones are still there" in str(error):
            wrong = ""
        return what, wrong or _wrong_after(folder)
    return what, "no error was raised"


def size_limits(folder: Path, rng: random.Random) -> Generator[Trial]:
    """Let no file grow beyond some bytes, as on a full disk."""
    while True:
        _prepared(folder)
        limit = rng.randrange(0, 2100)
        what = f"no file beyond {limit} bytes"
        try:
            with _largest_file(limit):
                save(folder, _THIRD)
        except StorageError:
            yield what, _wrong_after(folder)
        else:
            yield what, "no error was raised"
        shutil.rmtree(folder)


@contextmanager
def _largest_file(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- Damage ------------------------------------------------------------------------------------


def damages(folder: Path, rng: random.Random) -> Generator[Trial]:
    """Damage a file of the newest checkpoint."""
    while True:
        for step in (_FIRST, _SECOND):
            save(folder, step)
        newest = _at(folder, _SECOND)
        path = rng.choice(sorted(newest.iterdir()))
        how = rng.choice(sorted(_DAMAGES))
        before = path.read_bytes()
        _DAMAGES[how](path, rng)
        unchanged = path.is_file() and path.read_bytes() == before
        yield f"{path.name} {how}", "" if unchanged else _wrong_with_damaged(folder, newest, path)
        shutil.rmtree(folder)


def _wrong_with_damaged(folder: Path, newest: Path, path: Path) -> str:
    try:
        wrong = wrong_with(folder, {_SECOND})
    except CheckpointError as error:
        if str(path) not in str(error) or "fallback=True" not in str(error):
            return f"the message does not help: {error}"
    else:
        # JSON whose meaning is the same: white space of the manifest, say
        return wrong if path.name == "manifest.json" else "it was loaded"
    things = {"model": Holder(), "optimizer": Holder()}
    state = Checkpointer(folder).load(fallback=True, **things)
    if state.step != _FIRST or str(newest) not in state.notes[0]:
        return f"fell back to {state.step}, saying {state.notes}"
    return "" if all(thing.is_of(_FIRST) for thing in things.values()) else "a mixture was loaded"


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 100)))


def _zero(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + 512)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _swap(path: Path, rng: random.Random) -> None:
    """Put another file of the checkpoint in its place."""
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p != path))
    path.write_bytes(other.read_bytes())


def _folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "with a flipped bit": _flip,
    "cut off": _cut,
    "with more at its end": _grow,
    "with zeros in it": _zero,
    "replaced by another file": _swap,
    "missing": lambda path, _: path.unlink(),
    "replaced by a folder": _folder,
}
