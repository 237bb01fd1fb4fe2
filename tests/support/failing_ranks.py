"""What three ranks check of ranks that fail, hang and die; each in a run of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from splitlearn_core.sharded import load_sharded

TIMEOUT = 8.0
Settings = dict[str, Any]


def _load(settings: Settings, progress: Callable[[int, int], None] | None, source: str) -> Any:
    """Load; what one rank does meanwhile is up to `progress`."""
    dist.barrier()  # so that no rank's start counts
    absent = source == "full_state" and dist.get_rank() > 0
    path = None if absent else settings["llama"]
    begun = time.perf_counter()
    try:
        load_sharded(path, source=source, timeout=TIMEOUT, progress=progress)
    except Exception as error:  # noqa: BLE001 - told to the test
        ranks = list(getattr(error, "ranks", ()))
        kind, text = type(error).__name__, str(error)
        return {"kind": kind, "text": text, "ranks": ranks, "seconds": time.perf_counter() - begun}
    return None


def _at(rank: int, act: Callable[[], None]) -> Callable[[int, int], None] | None:
    return (lambda *_: act()) if dist.get_rank() == rank else None


def _fail() -> None:
    raise OSError(5, "the disk of this rank is gone")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(folder: Path) -> None:
    """Do nothing until the others have given up; the thread that loads gives no sign."""
    waiting = threading.Event()
    deadline = time.monotonic() + 60
    while not all((folder / f"gave-up-{rank}").exists() for rank in (0, 1)):
        waiting.wait(0.05)
        assert time.monotonic() < deadline


def check_a_rank_that_fails(folder: Path, settings: Settings) -> Any:
    del folder
    return _load(settings, _at(1, _fail), "slices")


def check_a_rank_that_hangs(folder: Path, settings: Settings) -> Any:
    found = _load(settings, _at(2, lambda: _hang(folder)), "slices")
    (folder / f"gave-up-{dist.get_rank()}").touch()
    return found


def check_a_rank_that_dies(folder: Path, settings: Settings) -> Any:
    del folder
    return _load(settings, _at(2, _die), "slices")


def check_a_receiver_that_dies(folder: Path, settings: Settings) -> Any:
    """Rank 0 hands out; rank 2 is gone when its share comes."""
    del folder
    return _load(settings, _at(2, _die), "full_state")


def check_a_reader_that_dies(folder: Path, settings: Settings) -> Any:
    """Rank 0 dies while it hands out."""
    del folder
    return _load(settings, _at(0, _die), "full_state")
