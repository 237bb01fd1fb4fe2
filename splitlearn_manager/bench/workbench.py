"""Where a benchmark of loading is set up: its checkpoints, its jobs, and whose bytes are whose."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.headers import read_header
from splitlearn_manager.bench import checkpoints
from splitlearn_manager.bench.checkpoints import BenchCheckpoint
from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.job import Job, Way
from splitlearn_manager.bench.page_cache import Span
from splitlearn_manager.bench.process import Measurement, measure

logger = logging.getLogger(__name__)

# Room for configs, indices, and what the file system keeps for itself.
_SPARE_DISK = 0.2e9
_TINY_POINTS = (2, 4)


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        runs: Fresh processes for each figure of time.
        points: The cuts.
        promised: Whether the targets are meant for this size.
        small: The checkpoint that most figures are of.
        small_sharded: The same in several files.
        large: The one that all parts are loaded of.
        experts: The one with many tensors.
    """

    runs: int
    points: tuple[int, int]
    promised: bool
    small: BenchCheckpoint
    small_sharded: BenchCheckpoint
    large: BenchCheckpoint
    experts: BenchCheckpoint


def full_scale(work_dir: Path) -> Scale:
    """Return what the documents' figures are of."""
    return Scale(
        runs=5,
        points=(8, 24),
        promised=True,
        small=BenchCheckpoint(checkpoints.QWEN2_1_5B, 1, work_dir),
        small_sharded=BenchCheckpoint(checkpoints.QWEN2_1_5B, 4, work_dir),
        large=BenchCheckpoint(checkpoints.QWEN2_7B, 4, work_dir),
        experts=BenchCheckpoint(checkpoints.EXPERTS_512, 8, work_dir),
    )


def quick_scale(work_dir: Path) -> Scale:
    """Return something tiny, to see that everything runs; its figures mean nothing."""
    sharded = BenchCheckpoint(checkpoints.QWEN2_TINY, 2, work_dir)
    return Scale(
        runs=1,
        points=_TINY_POINTS,
        promised=False,
        small=BenchCheckpoint(checkpoints.QWEN2_TINY, 1, work_dir),
        small_sharded=sharded,
        large=sharded,
        experts=BenchCheckpoint(checkpoints.EXPERTS_TINY, 2, work_dir),
    )


class Workbench:
    """One run: its checkpoints, and how jobs are put."""

    def __init__(self, scale: Scale, work_dir: Path) -> None:
        self.scale = scale
        self.work_dir = work_dir
        self._tiny = BenchCheckpoint(checkpoints.QWEN2_TINY, 1, work_dir)
        self._tiny_experts = BenchCheckpoint(checkpoints.EXPERTS_TINY, 2, work_dir)

    @property
    def trunk(self) -> str:
        """Name the part that most figures are of."""
        first, second = self.scale.points
        return f"Trunk [{first}, {second}) of {self.scale.small.shape.name}"

    @property
    def medians(self) -> str:
        """Say how figures of time came about."""
        return f"median of {self.scale.runs} fresh processes"

    def target(self, value: float) -> float | None:
        """Return a target, where the size is the one that it was promised for."""
        return value if self.scale.promised else None

    def prepare(self, wanted: Iterable[BenchCheckpoint], more_bytes: int = 0) -> None:
        """Make the checkpoints that are not there, after a look at the room on the disk.

        Args:
            wanted: Those that will be measured.
            more_bytes: What will be written besides.

        Raises:
            BenchError: The disk has no room for them; says how much is missing.
        """
        folders = {c.folder: c for c in (self._tiny, self._tiny_experts, *wanted)}
        absent = [checkpoint for checkpoint in folders.values() if not checkpoint.is_made()]
        need = sum(checkpoint.nbytes for checkpoint in absent) + more_bytes
        check_room(self.work_dir, need + _SPARE_DISK)
        for checkpoint in absent:
            checkpoint.make()

    def job(self, way: Way, checkpoint: BenchCheckpoint, **changes: Any) -> Job:
        """Return a job on a checkpoint, with a warm-up of the same architecture."""
        same = checkpoint.shape.model_type == self._tiny_experts.shape.model_type
        warm_up = self._tiny_experts if same else self._tiny
        return Job(
            way,
            str(checkpoint.folder),
            self.scale.points,
            str(warm_up.folder),
            _TINY_POINTS,
            **changes,
        )

    def each(
        self, jobs: Mapping[str, Job], before: Callable[[], None], runs: int | None = None
    ) -> dict[str, list[Measurement]]:
        """Do each job several times, in turns, so that the machine's moods meet them all.

        Args:
            jobs: By a name for the log.
            before: Called before each, to put the page cache in order.
            runs: How often, where not `Scale.runs` times.
        """
        results: dict[str, list[Measurement]] = {name: [] for name in jobs}
        for number in range(runs or self.scale.runs):
            for name, job in jobs.items():
                before()
                results[name].append(measure(job))
                logger.info("%s, run %d: %.2f s", name, number + 1, results[name][-1].seconds)
        return results

    def header_bytes(self, checkpoint: BenchCheckpoint) -> int:
        """Return the length of the headers of the files that hold the Trunk."""
        headers = [read_header(file) for file in checkpoint.files]
        return sum(
            min(info.start for info in tensors.values())
            for tensors in headers
            if any(self._is_in_trunk(name) for name in tensors)
        )

    def spans(self, file: Path) -> list[Span]:
        """Return where the Trunk's bytes lie in a file, in order, neighbours joined."""
        spans: list[Span] = []
        for name, info in read_header(file).items():  # in the order of their bytes
            if not self._is_in_trunk(name):
                continue
            if spans and spans[-1][1] == info.start:
                spans[-1] = (spans[-1][0], info.end)
            else:
                spans.append((info.start, info.end))
        return spans

    def _is_in_trunk(self, name: str) -> bool:
        """Whether a tensor is of one of the Trunk's layers."""
        first, second = self.scale.points
        words = name.split(".")
        return words[:2] == ["model", "layers"] and first <= int(words[2]) < second


def check_room(folder: Path, need: float) -> None:
    """Refuse to begin what the disk has no room for."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        missing = math.ceil((need - free) / 1e8) / 10
        raise BenchError(
            f"the checkpoints need {need / 1e9:.1f} GB more in {folder}, where"
            f" {free / 1e9:.1f} GB are free: {missing:.1f} GB are missing.  Name another"
            " --work-dir, or fewer --rows"
        )
