"""The daemon of the storm, as whoever started it sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from session_storm.families import Family

_CHILD = Path(__file__).with_name("daemon_child.py")
_SUPPORT, _PROJECT = _CHILD.parents[1], _CHILD.parents[3]
_PATIENCE = 120.0
_COUNTS = ("threads", "descriptors")


@dataclass(frozen=True)
class Look:
    """What the daemon holds at one moment.

    Attributes:
        tasks: What its event loop does -> how often.
        threads: Python's threads.
        descriptors: Open files.
        resident: Bytes in memory.
        held: Caches and sessions that there are.
        reserved: Model -> bytes.
        metrics: Those of sessions: name, labels, value.
    """

    tasks: dict[str, int]
    threads: int
    descriptors: int
    resident: int
    held: int
    reserved: dict[str, int]
    metrics: list[tuple[str, dict[str, str], float]]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric, where it has these labels."""
        return sum(
            value
            for found, own, value in self.metrics
            if found == f"splitlearn_{name}" and labels.items() <= own.items()
        )

    @property
    def is_quiet(self) -> bool:
        """Whether nobody is there any more."""
        return not self.held and not self.total("sessions_open")

    def left_since(self, before: Look, most_bytes: int) -> list[str]:
        """Return what there is that there was not before."""
        left = []
        if self.held or self.total("sessions_open"):
            left.append(f"{self.held} caches and sessions, {self.total('sessions_open'):.0f} open")
        for name in ("tasks", "reserved"):
            mine, other = getattr(self, name), getattr(before, name)
            if mine != other:
                left.append(f"{name}: {other} became {mine}")
        counts = {name: (getattr(before, name), getattr(self, name)) for name in _COUNTS}
        left += [f"{a} {name} became {b}" for name, (a, b) in counts.items() if b > a]
        if self.resident - before.resident > most_bytes:
            left.append(f"{(self.resident - before.resident) / 1e6:.1f} MB more are resident")
        return left


class Place:
    """A daemon that serves the Trunks of some families.

    Args:
        folder: For models, and for the daemon's log.
        families: Whose Trunks.
        idle_timeout: Seconds after which a session without a step ends.
        resume_timeout: Seconds after which one without a connection does.

    Attributes:
        url: Its address.
    """

    def __init__(
        self, folder: Path, families: Iterable[Family], idle_timeout: float, resume_timeout: float
    ) -> None:
        self.folder = folder
        self.idle_timeout = idle_timeout
        self.resume_timeout = resume_timeout
        self._log = folder / "daemon.log"
        models = [f"{f.name}={f.place(folder)}={f.cut[0]},{f.cut[1]}" for f in families]
        self._command = [sys.executable, str(_CHILD), str(idle_timeout), str(resume_timeout)]
        self._command += models
        self.url = ""

    def __enter__(self) -> Self:
        """Start the daemon, and wait until it is ready."""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(os.environ),
            )
        self.url = self._line().removeprefix("splitlearn: listening on ")
        ready = self._line()
        assert ready.startswith("splitlearn: ready"), ready
        return self

    def __exit__(self, *_: object) -> None:
        """End the daemon, however the storm went."""
        self._process.kill()
        self._process.communicate()

    def look(self) -> Look:
        """Return what the daemon holds now."""
        assert self._process.stdin is not None
        self._process.stdin.write("look\n")
        self._process.stdin.flush()
        return Look(**json.loads(self._line()))

    def look_when_quiet(self, before: Look | None = None) -> Look:
        """Return what the daemon holds when nobody is there any more, or has not gone for long."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            look = self.look()
            settled = before is None or not look.left_since(before, sys.maxsize)
            if (look.is_quiet and settled) or time.monotonic() > deadline:
                return look
            time.sleep(0.1)

    def complaints(self) -> str:
        """Return what the daemon logged as an error."""
        lines = self._log.read_text().splitlines()
        first = next((n for n, line in enumerate(lines) if " ERROR " in line), None)
        return "" if first is None else "\n".join(lines[first : first + 40])

    def end(self) -> str:
        """Let the daemon end; return what was wrong with that."""
        self._process.communicate(timeout=_PATIENCE)
        code = self._process.returncode
        return f"the daemon ended with {code}" if code else ""

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().rstrip("\n")
        assert line, self._log.read_text()[-2000:]
        return line


def _environment(own: Mapping[str, str]) -> dict[str, Any]:
    paths = (str(_PROJECT), str(_SUPPORT), own.get("PYTHONPATH", ""))
    return {**own, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
