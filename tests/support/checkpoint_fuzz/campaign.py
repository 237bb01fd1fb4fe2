"""Try cases in processes of their own, watched from here, and collect the verdicts."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from checkpoint_fuzz.cases import Case
from checkpoint_fuzz.judge import Verdict
from checkpoint_fuzz.worker import READY

SECONDS = 20
START_SECONDS = 120
CASES_OF_A_WORKER = 300
_SUPPORT = Path(__file__).resolve().parent.parent
_LOG_TAIL = 2000


def fuzz(chosen: Iterable[Case], sound: Path) -> Iterator[Verdict]:
    """Try cases one after the other; a process that one ends is replaced, and that is noted.

    Args:
        chosen: What to try.
        sound: From `make_sound`.
    """
    waiting = deque(chosen)
    while waiting:
        with _Worker(sound) as worker:
            for _ in range(CASES_OF_A_WORKER):
                if not (waiting and worker.is_up):
                    break
                yield worker.examine(waiting.popleft())


class _Worker:
    """A process that tries cases, with a scratch folder of its own, for as long as a block lasts.

    Attributes:
        is_up: Whether it can try another.
    """

    def __init__(self, sound: Path) -> None:
        self._sound = sound
        self._stack = ExitStack()
        self.is_up = False

    def __enter__(self) -> Self:
        room = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        scratch = room / "scratch"
        (scratch / "temporary").mkdir(parents=True)
        self._log = self._stack.enter_context((room / "log").open("w+b"))
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-X", "faulthandler", "-m", "checkpoint_fuzz.worker"),
                *(str(self._sound), str(scratch)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(scratch),
        )
        self._stack.enter_context(self._process)
        self._stack.callback(self._process.kill)
        self.is_up = self._answer(START_SECONDS) == READY
        if not self.is_up:
            with self._stack:
                raise RuntimeError(f"no start: the process {self._how_it_ended()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def examine(self, case: Case) -> Verdict:
        """Return the verdict; how the process ended is one, too."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n".encode())
        self._process.stdin.flush()
        answer = self._answer(SECONDS)
        if answer is not None:
            return Verdict(**answer)
        self.is_up = False
        return Verdict(str(case), violations=[f"the process {self._how_it_ended()}"])

    def _answer(self, seconds: float) -> Any:
        """Return what the process writes, or `None` if it ends or takes too long."""
        output = self._process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], seconds)
        self._hung = not ready
        line = output.readline() if ready else b""
        return json.loads(line) if line.endswith(b"\n") else None

    def _how_it_ended(self) -> str:
        self._process.kill()
        end = "hung" if self._hung else f"ended with {self._process.wait()}"
        self._log.seek(0)
        return f"{end}: {self._log.read().decode(errors='replace')[-_LOG_TAIL:]}"


def _environment(scratch: Path) -> dict[str, str]:
    """Return an environment in which everything that could be left behind lies in `scratch`."""
    own = {
        "TMPDIR": scratch / "temporary",
        "HF_HOME": scratch / "hub",
        "SPLITLEARN_CACHE_DIR": scratch / "cache",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": _SUPPORT,
    }
    return os.environ | {key: str(value) for key, value in own.items()}
