"""Fetch a part from a hub, in a process that kills itself where it is told to.

    download_child.py ADDRESS CACHE            prints how often each line of the loading code ran
    download_child.py ADDRESS CACHE LINE TIME  SIGKILL when that line runs for that time

Imports no torch: it is started often.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from splitlearn_core import loading
from splitlearn_core.loading.fetch import FetchOptions
from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_parts import HubParts
from splitlearn_core.loading.ranges import Located

REPO = "someone/model"
FILE = "model.safetensors"
# Requests that are small, reported and recorded at once: there are many points to be killed at.
OPTIONS = FetchOptions(
    workers=2, least_request=24_000, most_request=24_000, record_bytes=1, report_bytes=1
)
_LOADING = str(Path(loading.__path__[0]))


class Tracer:
    """Counts the lines of the loading code that run, in every thread, and may end it at one."""

    def __init__(self, line: str = "", time: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self._fatal = (line, time)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Trace this thread, and those that it starts."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def _enter(self, frame: Any, _event: str, _argument: Any) -> Any:
        return self._step if frame.f_code.co_filename.startswith(_LOADING) else None

    def _step(self, frame: Any, event: str, _argument: Any) -> Any:
        if event == "line":
            line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            with self._lock:
                self.counts[line] += 1
                if (line, self.counts[line]) == self._fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
        return self._step


def wanted(names: Any) -> list[str]:
    """Return the tensors of the part."""
    return [name for name in names if name.startswith("middle.")]


def main() -> None:
    """Fetch a part; what was fetched before a kill is gone on with."""
    address, cache, *fatal = sys.argv[1:]
    tracer = Tracer(fatal[0], int(fatal[1])) if fatal else Tracer()
    parts = HubParts(HubFiles(REPO, Path(cache), endpoint=address), OPTIONS)
    tracer.start()
    header = parts.header(FILE)
    assert header is not None
    parts.obtain({name: Located(FILE, header[name]) for name in wanted(header)}, lambda *_: None)
    sys.settrace(None)
    sys.stdout.write(json.dumps(tracer.counts))


if __name__ == "__main__":
    main()
