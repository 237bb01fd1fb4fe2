"""Training that is killed at random and gone on with, at one rank or two: `train_resumable.py`.

Each life of a run is one process for each rank, forked from a process that has torch, and killed
when a step was taken that chance has chosen, or a moment later; the last one ends by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

_SCRIPT = Path(__file__).parents[2] / "scripts" / "train_resumable.py"
_ALIKE = 1e-5
_DEADLINE = 300
_KINDS = 4
_STEPS_PER_KILL = 50
# A kill comes so long after a step was told, at most: amid the next ones, or a save.
_LONGEST_DELAY = 0.05

Trial = tuple[str, str]
"""What was tried, and what is wrong with what came of it: nothing, as a rule."""


def campaign(folder: Path, seed: int, count: int, steps: int = 300) -> Iterator[Trial]:
    """Yield `count` runs, each killed several times: at one rank, at two, and at both in turns."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    with Lives(folder, steps) as lives:
        whole = {(ranks, 0.0): lives.uninterrupted(ranks, 0.0) for ranks in (1, 2)}
        if count >= _KINDS:
            whole[1, 0.1] = lives.uninterrupted(1, 0.1)
        largest = _largest_difference(whole[1, 0.0], whole[2, 0.0])
        yield f"2 ranks against 1: {largest:.2g}", "" if largest <= _ALIKE else "too far apart"
        for number in range(count):
            kinds: list[tuple[Sequence[int], float]] = [((1,), 0.0), ((2,), 0.0), ((1, 2), 0.0)]
            worlds, dropout = [*kinds, ((1,), 0.1)][number % _KINDS]
            kills = sorted(rng.sample(range(1, steps), max(2, min(4, steps // _STEPS_PER_KILL))))
            losses, lived = lives.interrupted(f"run-{number}", worlds, dropout, kills, rng)
            expected = whole[worlds[0], dropout]
            what = f"ranks {lived}, dropout {dropout}, killed after steps {kills}"
            largest = _largest_difference(losses, expected)
            allowed = _ALIKE if len(worlds) > 1 else 0.0
            yield f"{what}: {largest:.2g}", "" if largest <= allowed else "other losses"


def _largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


class Lives:
    """Starts runs, and ends them."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._steps = steps

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_DEADLINE)

    def uninterrupted(self, ranks: int, dropout: float) -> list[float]:
        """Return the losses of a run that nothing befalls."""
        run = self._folder / f"whole-{ranks}-{dropout}"
        self._live(run, ranks, dropout, None, 0.0)
        return self._losses(run)

    def interrupted(
        self, name: str, worlds: Sequence[int], dropout: float, kills: list[int], rng: random.Random
    ) -> tuple[list[float], list[int]]:
        """Return the losses of a run that is killed, and the ranks that each life had."""
        run = self._folder / name
        lived = []
        for life, kill in enumerate([*kills, None]):
            ranks = worlds[life % len(worlds)]
            lived.append(ranks)
            self._live(run, ranks, dropout, kill, rng.random() * _LONGEST_DELAY)
        losses = self._losses(run)
        shutil.rmtree(run)
        return losses, lived

    def _losses(self, run: Path) -> list[float]:
        losses: list[float] = json.loads((run / "losses.json").read_text())
        return losses

    def _live(self, run: Path, ranks: int, dropout: float, kill: int | None, delay: float) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = [str(run), self._steps, dropout, ranks, kill, delay]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        expected = [0] * ranks if kill is None else [-signal.SIGKILL] * ranks
        assert ended == expected, f"{order}: ended with {ended}"


# --- In the process that starts the lives ------------------------------------------------------


def _main() -> None:
    script = _script()
    for line in sys.stdin:
        folder, steps, dropout, ranks, kill, delay = json.loads(line)
        settings = script.Settings(Path(folder), steps, _every(steps), dropout)
        reading, writing = os.pipe()
        meeting = Path(f"{folder}.meeting")
        meeting.unlink(missing_ok=True)
        pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                _be(script, settings, rank, ranks, meeting, writing)
            pids.append(pid)
        os.close(writing)
        if kill is not None:
            _wait_for_step(reading, kill)
            time.sleep(delay)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.close(reading)
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


def _every(steps: int) -> int:
    """Return how many steps lie between two checkpoints."""
    return max(2, steps // 20)


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("train_resumable", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _be(script: Any, settings: Any, rank: int, ranks: int, meeting: Path, writing: int) -> None:
    """Be one rank of one life; tell of each step."""
    code = 1
    try:
        progress = (lambda step: os.write(writing, b"%d\n" % step)) if rank == 0 else (lambda _: 0)
        if ranks == 1:
            script.train(settings, progress)
        else:
            where = f"file://{meeting}"
            with script.joined_group(where, rank=rank, world_size=ranks, timeout=60):
                script.train(settings, progress)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait_for_step(reading: int, step: int) -> None:
    """Wait until a life tells of a step from `step` on, or of its end."""
    with os.fdopen(os.dup(reading), "rb") as lines:
        for line in lines:
            if int(line) >= step:
                return


if __name__ == "__main__":
    _main()
