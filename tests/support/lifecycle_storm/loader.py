"""A loader whose loads meet every fate, as the driver says."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from splitlearn_core.estimate import MemoryEstimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.progress import LoadProgress

LONGEST_WAIT = 60.0
"""Seconds after which a thread that nobody released ends by itself; the driver releases all."""


class Unspeakable(Exception):  # noqa: N818 - what it is, not what it means
    """An error that can't even be shown."""

    def __str__(self) -> str:
        raise ZeroDivisionError


ERRORS: dict[str, Callable[[], BaseException]] = {
    "disk": lambda: OSError(28, "no space left on device"),
    "memory": lambda: MemoryError("no"),
    "network": lambda: ConnectionResetError("gone"),
    "exit": lambda: SystemExit(3),
    "unspeakable": Unspeakable,
}
WAITING = ("held", "deaf", "moving")
FATES = ("quick", "slow", "grows", "cyclic", *WAITING, *ERRORS)


class Fate:
    """What becomes of one load.

    Attributes:
        kind: One of `FATES`: `held` waits, then listens; `deaf` waits, and never listens; `moving`
            waits, and reports all the time.
        gate: Lets one go on that waits.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.gate = threading.Event()


class StormModel:
    """A model that answers with what it was asked."""

    component = "trunk"
    start_layer, end_layer = 2, 6
    device, dtype = "cpu", "float32"

    def __init__(self, nbytes: int, *, cyclic: bool) -> None:
        self.nbytes = nbytes
        self.itself = self if cyclic else None
        self.ballast = bytearray(nbytes)

    def resident_bytes(self) -> int:
        return self.nbytes

    def __call__(self, value: Any) -> Any:
        return value


class StormLoader:
    """Loads as it is told to, at once where nothing was said.

    Attributes:
        fates: Of the next loads of each model, in order.
        waiting: Those that were met and wait.
    """

    def __init__(self, sizes: dict[str, MemoryEstimate]) -> None:
        self.fates: dict[str, deque[Fate]] = {model_id: deque() for model_id in sizes}
        self.waiting: list[Fate] = []
        self._sizes = sizes

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        return self._sizes[config.model_id]

    def load_from_config(self, config: ModelConfig, progress: LoadProgress | None = None) -> Any:
        assert progress is not None
        try:
            fate = self.fates[config.model_id].popleft()
        except IndexError:
            fate = Fate("quick")
        size = self._sizes[config.model_id].steady_bytes
        if fate.kind in WAITING:
            self.waiting.append(fate)
        _meet(fate, progress, size)
        nbytes = 2 * size if fate.kind == "grows" else size - size // 4
        return StormModel(nbytes, cyclic=fate.kind == "cyclic")

    def release_all(self) -> None:
        """Let everything go on that waits, or will."""
        for fate in [*self.waiting, *(f for queue in self.fates.values() for f in queue)]:
            fate.gate.set()


def _meet(fate: Fate, progress: LoadProgress, size: int) -> None:
    """Do what a fate says, as a loader does: with a tensor in hand."""
    tensor = bytearray(size)
    if fate.kind == "moving":
        deadline = time.monotonic() + LONGEST_WAIT
        while not fate.gate.wait(0.002) and time.monotonic() < deadline:
            progress((progress.bytes_done + 1) % size, size)
    elif fate.kind in WAITING:
        fate.gate.wait(LONGEST_WAIT)
    if fate.kind in ERRORS:
        progress(size // 2, size)
        make_error = ERRORS[fate.kind]
        raise make_error()
    if fate.kind != "deaf":
        for done in range(0, size, max(1, size // (40 if fate.kind == "slow" else 2))):
            progress(done, size)
            time.sleep(0.0005 if fate.kind == "slow" else 0)
        progress(size, size)
    del tensor
