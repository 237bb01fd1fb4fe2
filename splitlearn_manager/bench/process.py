"""Run one way of loading in a fresh process, and watch its memory from outside.

What is counted (proc(5)):

- *anonymous* memory is `RssAnon` of `/proc/PID/status`, read every half millisecond while a step
  runs.  It is what a process alone pays for; mapped pages of a file are the page cache's.  A rise
  that comes and goes within one interval is missed: that is at most what can be zeroed in it,
  about 2 MB.  The kernel may count it in batches, up to some 100 KB for each core.
- *resident* memory is `Rss` of `/proc/PID/smaps_rollup`, which is exact: anonymous and mapped.

Both are differences from what the process had when its imports and a warm-up were done and freed
memory was given back.  The watcher holds no lock of the watched process, so that its own work
neither hides a peak nor makes one.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from splitlearn_manager.bench.errors import BenchError

if TYPE_CHECKING:
    from splitlearn_manager.bench.job import Job

_INTERVAL_SECONDS = 0.0005
_STATUS_BYTES = 4096
_ANONYMOUS = re.compile(rb"RssAnon:\s+(\d+) kB")
_RESIDENT = re.compile(r"^Rss:\s+(\d+) kB", re.MULTILINE)
_STDERR_LINES = 15


@dataclass(frozen=True)
class StepFigures:
    """What one step took.

    Attributes:
        seconds: Wall time.
        peak_anonymous: Most anonymous bytes at any time, beyond the baseline.
    """

    seconds: float
    peak_anonymous: int


@dataclass(frozen=True)
class Measurement:
    """What a job took.

    Attributes:
        steps: Of each step.
        resident: Resident bytes after the last one, beyond the baseline.
        nbytes: Bytes of the weights that were loaded.
    """

    steps: Mapping[str, StepFigures]
    resident: int
    nbytes: int

    @property
    def seconds(self) -> float:
        """Wall time of all steps but the forward."""
        return sum(figures.seconds for name, figures in self.steps.items() if name != "forward")

    @property
    def peak_anonymous(self) -> int:
        """Most anonymous bytes in any step, the forward included."""
        return max(figures.peak_anonymous for figures in self.steps.values())


def measure(job: Job, environment: Mapping[str, str] | None = None) -> Measurement:
    """Do a job in a fresh process.

    Args:
        job: What to do.
        environment: Variables to set for it.

    Raises:
        BenchError: The system tells nothing of a process's memory, or the process failed; says
            how it ended and what it wrote.
    """
    with started("splitlearn_manager.bench.child", job.to_json(), environment) as child:
        child.answer()
        anonymous, resident = child.anonymous(), child.resident()
        steps: dict[str, StepFigures] = {}
        answer: dict[str, Any] = {}
        for step in job.steps:
            answer, peak = child.go()
            steps[step] = StepFigures(answer["seconds"], max(0, peak - anonymous))
        return Measurement(steps, child.resident() - resident, answer["nbytes"])


def figures_of(module: str, task: str, **arguments: Any) -> Any:
    """Let a module of ours do a task in a fresh process; return the JSON that it answers with.

    Raises:
        BenchError: The process failed; says how it ended and what it wrote.
    """
    command = [sys.executable, "-m", module, task, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-_STDERR_LINES:])
        raise BenchError(f"the measured process ended with {done.returncode}:\n{tail}")
    return json.loads(done.stdout)


@contextmanager
def started(
    module: str, line: str, environment: Mapping[str, str] | None = None
) -> Iterator[Child]:
    """Start a module of ours in a fresh process, to be watched, and end it with the block.

    Args:
        module: Reads lines, each of which lets it take a step, and answers with lines of JSON.
        line: The first that it reads.
        environment: Variables to set for it.

    Raises:
        BenchError: The system tells nothing of a process's memory.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise BenchError("memory is measured through Linux's /proc, which is not here")
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(  # noqa: S603 - this very Python, and a module of our own
            [sys.executable, "-m", module],
            env={**os.environ, **(environment or {})},
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as process,
    ):
        try:
            child = Child(process, stderr)
            child.tell(line)
            yield child
        finally:
            process.kill()


class Child:
    """A measured process, as seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[str]) -> None:
        if process.stdin is None or process.stdout is None:
            raise BenchError("a measured process needs pipes to talk through")
        self._process = process
        self._orders, self._answers = process.stdin, process.stdout
        self._stderr = stderr
        self._folder = Path("/proc") / str(process.pid)

    def tell(self, line: str) -> None:
        """Send a line."""
        try:
            self._orders.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise self._failed() from None

    def answer(self) -> dict[str, Any]:
        """Wait for a line."""
        line = self._answers.readline()
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def go(self, line: str = "") -> tuple[dict[str, Any], int]:
        """Let it take the next step; return its answer and the peak of its anonymous bytes."""
        status = os.open(self._folder / "status", os.O_RDONLY)
        try:
            self.tell(line)
            peak = _anonymous(status)
            while not select.select([self._answers], [], [], _INTERVAL_SECONDS)[0]:
                peak = max(peak, _anonymous(status))
            # it waits now, so this is what the step left behind
            return self.answer(), max(peak, _anonymous(status))
        finally:
            os.close(status)

    def anonymous(self) -> int:
        """Return its anonymous bytes."""
        return _anonymous_in((self._folder / "status").read_bytes())

    def resident(self) -> int:
        """Return its resident bytes."""
        text = (self._folder / "smaps_rollup").read_text(encoding="utf-8")
        match = _RESIDENT.search(text)
        return int(match[1]) * 1024 if match else 0

    def _failed(self) -> BenchError:
        code = self._process.wait()
        how = f"signal {-code} (9: out of memory?)" if code < 0 else f"exit code {code}"
        self._stderr.seek(0)
        tail = "".join(self._stderr.readlines()[-_STDERR_LINES:])
        return BenchError(f"the measured process ended with {how}:\n{tail}")


def _anonymous(status: int) -> int:
    """Return what an open `status` says now; of a process that has ended, 0."""
    try:
        return _anonymous_in(os.pread(status, _STATUS_BYTES, 0))
    except ProcessLookupError:
        return 0


def _anonymous_in(status: bytes) -> int:
    match = _ANONYMOUS.search(status)
    return int(match[1]) * 1024 if match else 0
