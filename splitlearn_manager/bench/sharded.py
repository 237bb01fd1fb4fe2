"""What loading a model over two ranks takes of each: FSDP2 by slices, beside the other ways.

The ranks meet through a file and speak over loopback.  Their memory is watched from outside, as in
`process.py`: anonymous memory (`RssAnon`) and all that is resident (`VmRSS`), read every half
millisecond.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from splitlearn_manager.bench import checkpoints, page_cache
from splitlearn_manager.bench.checkpoints import BenchCheckpoint, Shape
from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.workbench import check_room

logger = logging.getLogger(__name__)

RANKS = 2
_CHILD = "splitlearn_manager.bench.sharded_child"
_MB = 1e6
_INTERVAL_SECONDS = 0.0005
_STATUS_BYTES = 4096
_STDERR_LINES = 15
_KINDS = {
    "anonymous": re.compile(rb"RssAnon:\s+(\d+) kB"),
    "resident": re.compile(rb"VmRSS:\s+(\d+) kB"),
}
_PEERS = {
    "ours_full_state": "load_sharded(source='full_state')",
    "ours_fsdp1": "load_sharded(how='fsdp1')",
    "seeds_fsdp2": "FSDP2, state dict of rank 0's from_pretrained broadcast by torch",
    "seeds_fsdp1": "FSDP1 around each rank's from_pretrained",
}


class _Scale(NamedTuple):
    """Which model, in how many files, and whether the targets are meant for it."""

    shape: Shape
    files: int
    promised: bool


_FULL = _Scale(checkpoints.QWEN2_0_5B, 3, True)
_QUICK = _Scale(checkpoints.QWEN2_TINY, 2, False)


@dataclass(frozen=True)
class _Figures:
    """What one way took.

    Attributes:
        seconds: Of the load; the slowest rank's.
        load: Peak bytes of each rank while it loaded, by kind, beyond what it had before.
        forward: The same while it ran some tokens.
        logits: A hash of what each rank computed.
    """

    seconds: float
    load: list[dict[str, int]]
    forward: list[dict[str, int]]
    logits: list[str]

    def peak(self, kind: str) -> int:
        """Return the most that any rank took while it loaded."""
        return max(peaks[kind] for peaks in self.load)


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make the checkpoint that is needed, and measure.

    Args:
        work_dir: Holds the checkpoint, which stays there for the next run.
        groups: Which of `ROWS`.
        quick: Whether to take a tiny model and no targets.

    Raises:
        BenchError: There is no room on the disk, or a rank failed.
    """
    scale = _QUICK if quick else _FULL
    checkpoint = BenchCheckpoint(scale.shape, scale.files, work_dir)
    small = BenchCheckpoint(checkpoints.QWEN2_TINY, 1, work_dir)
    for one in (checkpoint, small):
        if not one.is_made():
            check_room(work_dir, one.nbytes)
            one.make()
    rows: list[Row] = []
    with _started() as ranks:
        bench = _Bench(scale, checkpoint, small, ranks)
        for group in groups:
            logger.info("measuring %s", group)
            rows += ROWS[group](bench)
    return Report.here(rows)


class _Bench:
    """One run: its checkpoint, and how a way is measured."""

    def __init__(
        self, scale: _Scale, checkpoint: BenchCheckpoint, small: BenchCheckpoint, ranks: _Ranks
    ) -> None:
        self.scale = scale
        self.checkpoint = checkpoint
        self._small = small
        self._ranks = ranks

    @property
    def share(self) -> float:
        """Bytes of the weights that each rank is to hold."""
        return self.checkpoint.nbytes / RANKS

    @property
    def title(self) -> str:
        """Name what is loaded."""
        return f"{self.scale.shape.name} over {RANKS} ranks"

    def target(self, value: float) -> float | None:
        """Return a target, where the size is the one that it was promised for."""
        return value if self.scale.promised else None

    def figures(self, way: str, ranks: int = RANKS) -> _Figures:
        """Load in one way, and run some tokens."""
        page_cache.warm(self.checkpoint.files)
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "way": way,
                "model": str(self.checkpoint.folder),
                "warm_up": str(self._small.folder),
                "folder": folder,
            }
            before = self._ranks.begin(job, ranks)
            answers, load = self._ranks.step()
            seconds = max(answer["seconds"] for answer in answers)
            answers, forward = self._ranks.step()
            logits = [answer["logits"] for answer in answers]
            self._ranks.end()
        found = _Figures(seconds, _beyond(load, before), _beyond(forward, before), logits)
        logger.info("%s: %.2f s, %s", way, seconds, found.load)
        return found


def _beyond(peaks: list[dict[str, int]], before: list[dict[str, int]]) -> list[dict[str, int]]:
    return [
        {kind: max(0, peak[kind] - base[kind]) for kind in peak}
        for peak, base in zip(peaks, before, strict=True)
    ]


@contextmanager
def _started() -> Iterator[_Ranks]:
    """Start the process that ranks are forked from, and end it with the block."""
    orders = [os.pipe() for _ in range(RANKS)]
    answers = [os.pipe() for _ in range(RANKS)]
    theirs = [(order[0], answer[1]) for order, answer in zip(orders, answers, strict=True)]
    files = [os.fdopen(answer[0], "rb", buffering=0) for answer in answers]
    ours = [order[1] for order in orders]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(  # noqa: S603 - this very Python, and a module of our own
            [sys.executable, "-m", _CHILD, json.dumps(theirs)],
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[descriptor for pair in theirs for descriptor in pair],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        ) as process,
    ):
        for pair in theirs:
            for descriptor in pair:
                os.close(descriptor)
        try:
            yield _Ranks(process, ours, files, stderr)
        finally:
            for descriptor in ours:
                os.close(descriptor)  # a rank that waits for an order ends
            for file in files:
                file.close()


class _Ranks:
    """Ranks that do one job after the other, as seen from outside."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        orders: list[int],
        every: Sequence[IO[bytes]],
        stderr: IO[str],
    ) -> None:
        if process.stdin is None:
            raise BenchError("measured ranks need a pipe to be told through")
        self._process = process
        self._jobs = process.stdin
        self._every = list(zip(orders, every, strict=True))
        self._stderr = stderr
        self._orders: list[int] = []
        self._files: list[IO[bytes]] = []
        self._pids: list[int] = []

    def begin(self, job: dict[str, Any], ranks: int) -> list[dict[str, int]]:
        """Let so many ranks warm up for a job; return what each has in memory then."""
        self._orders = [order for order, _ in self._every[:ranks]]
        self._files = [file for _, file in self._every[:ranks]]
        self._jobs.write(json.dumps({**job, "ranks": ranks}).encode() + b"\n")
        self._jobs.flush()
        self._pids = [self._line(file)["pid"] for file in self._files]
        return [_memory(Path(f"/proc/{pid}/status").read_bytes()) for pid in self._pids]

    def end(self) -> None:
        """Let the ranks end."""
        for order in self._orders:
            os.write(order, b".")

    def step(self) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
        """Let all ranks take a step; return their answers, and the peaks of their memory."""
        statuses = [os.open(f"/proc/{pid}/status", os.O_RDONLY) for pid in self._pids]
        try:
            for order in self._orders:
                os.write(order, b".")
            peaks: list[dict[str, int]] = [dict.fromkeys(_KINDS, 0) for _ in statuses]
            waiting = list(self._files)
            found: dict[int, dict[str, Any]] = {}
            while waiting:
                ready = select.select(waiting, [], [], _INTERVAL_SECONDS)[0]
                _look(statuses, peaks)
                for file in ready:
                    found[file.fileno()] = self._line(file)
                    waiting.remove(file)
            _look(statuses, peaks)
            return [found[file.fileno()] for file in self._files], peaks
        finally:
            for status in statuses:
                os.close(status)

    def _line(self, file: IO[bytes]) -> dict[str, Any]:
        line = file.readline()
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self) -> BenchError:
        self._process.kill()
        code = self._process.wait()
        self._stderr.seek(0)
        tail = "".join(self._stderr.readlines()[-_STDERR_LINES:])
        return BenchError(f"the measured ranks ended with {code}:\n{tail}")


def _look(statuses: Sequence[int], peaks: Sequence[dict[str, int]]) -> None:
    """Raise peaks to what is in memory now."""
    for status, peak in zip(statuses, peaks, strict=True):
        try:
            found = _memory(os.pread(status, _STATUS_BYTES, 0))
        except ProcessLookupError:
            continue  # it has ended; that is seen where its answer is missing
        for kind, value in found.items():
            peak[kind] = max(peak[kind], value)


def _memory(status: bytes) -> dict[str, int]:
    """Return the bytes of each kind that a process's `status` tells, see proc(5)."""
    found = {kind: pattern.search(status) for kind, pattern in _KINDS.items()}
    return {kind: int(match[1]) * 1024 if match else 0 for kind, match in found.items()}


def _fsdp2(bench: _Bench) -> list[Row]:
    """Return the rows of FSDP2, each rank reading its own slices."""
    ours, whole = bench.figures("ours"), bench.figures("unsharded", ranks=1)
    share = bench.share
    name = f"{bench.title}, FSDP2 by slices"
    note = f"of a share of {share / _MB:,.0f} MB; the higher of the two ranks"
    wrong = sum(logits != whole.logits[0] for logits in ours.logits)
    return [
        Row(
            f"{name}: peak anonymous memory, load",
            ours.peak("anonymous") / share,
            "x share",
            "<=",
            bench.target(1.06),
            whole.peak("anonymous") / share,
            f"{note}; compared with the unsharded model as it is stored, mapped",
        ),
        Row(
            f"{name}: peak resident memory, load",
            ours.peak("resident") / share,
            "x share",
            "<=",
            bench.target(1.5),
            whole.peak("resident") / share,
            note,
        ),
        Row(
            f"{name}: ranks whose logits differ from the unsharded model's",
            float(wrong),
            "",
            "<=",
            0.0,
            None,
            "compared to the bit, in the dtype that is stored",
        ),
        Row(f"{name}: load", ours.seconds, "s", "<=", None, whole.seconds, "one run, warm"),
        Row(
            f"{name}: peak anonymous memory, first forward",
            max(peaks["anonymous"] for peaks in ours.forward) / share,
            "x share",
            "<=",
        ),
    ]


def _peers(bench: _Bench) -> list[Row]:
    """Return the rows of the other ways, without targets."""
    rows: list[Row] = []
    for way, title in _PEERS.items():
        figures = bench.figures(way)
        name = f"{bench.title}, {title}"
        for kind in _KINDS:
            each = [peaks[kind] / bench.share for peaks in figures.load]
            said = ", ".join(f"rank {rank}: {value:.2f}" for rank, value in enumerate(each))
            rows.append(
                Row(f"{name}: peak {kind} memory, load", max(each), "x share", "<=", note=said)
            )
        rows.append(Row(f"{name}: load", figures.seconds, "s", "<=", note="one run, warm"))
    return rows


ROWS: dict[str, Callable[[_Bench], list[Row]]] = {"fsdp2": _fsdp2, "peers": _peers}
"""What `--rows` can name -> what measures it."""
