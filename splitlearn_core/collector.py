"""Hold Python's cycle collector back while very many objects are made that all stay.

The collector looks through every object of the process each time that their number has grown by a
quarter; torch and transformers alone make some 400,000.  Reading the names of a checkpoint with
100,000 tensors takes twice as long with it, and nothing there is in a cycle.
"""

from __future__ import annotations

import gc
from threading import Lock


class _CollectorPaused:
    """A context in which no collection begins; for the whole process, by any number of threads.

    What reference counts free is freed as always.  Nothing may be waited for in it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._holders = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._was_enabled:
                gc.enable()


collector_paused = _CollectorPaused()
