"""The process in which saving and loading are measured: each line that it reads names a way.

Memory is read from outside, by the process that started it; only the clock runs here.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitlearn_core.checkpoint.resume import Checkpointer
from splitlearn_core.tensor_writer import raw_bytes
from splitlearn_manager.bench import checkpoints
from splitlearn_manager.bench.checkpoints import BenchCheckpoint
from splitlearn_manager.bench.page_cache import read_spans

_SHAPES = {shape.name: shape for shape in (checkpoints.QWEN2_0_5B, checkpoints.QWEN2_TINY)}
END = "end"
"""Instead of a way: nothing is to stay on the disk."""

_POOL_ELEMENTS = 1 << 20


class _Weights(nn.Module):
    """Tensors of a real model's shapes, under names of their own."""

    def __init__(self, state: BenchCheckpoint) -> None:
        super().__init__()
        pool = torch.randn(_POOL_ELEMENTS, generator=torch.Generator().manual_seed(0))
        self.values = nn.ParameterList()
        for spec in state.tensors.values():
            value = torch.empty(spec.shape, dtype=spec.dtype)
            flat = value.view(-1)
            for start in range(0, flat.numel(), _POOL_ELEMENTS):
                piece = flat[start : start + _POOL_ELEMENTS]
                piece.copy_(pool[: piece.numel()])
            self.values.append(nn.Parameter(value))


class _Bench:
    """The state, and the ways to bring it to the disk and back."""

    def __init__(self, shape: str, folder: Path) -> None:
        state = BenchCheckpoint(_SHAPES[shape], 1, folder)
        self._folder = folder / "checkpoint-bench"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._model = _Weights(state)
        self._checkpointer = Checkpointer(self._folder / "run")
        self._step = 0
        self._plain = self._folder / "plain"

    def take(self, way: str) -> dict[str, float]:
        """Take one way; return its `seconds`, and of these how many the caller `waited`."""
        self._prepare(way)
        start = time.perf_counter()
        returned = _WAYS[way](self)
        seconds = time.perf_counter() - start
        self._checkpointer.wait()
        waited = seconds if returned is None else returned - start
        return {"seconds": seconds, "waited": waited}

    def close(self) -> None:
        """Leave nothing."""
        self._checkpointer.close()
        shutil.rmtree(self._folder)

    def _prepare(self, way: str) -> None:
        """Make what is read, and wait for the disk, so that each way finds it idle."""
        if way == "write":
            self._plain.unlink(missing_ok=True)
        elif way == "read" and not self._plain.exists():
            self.write()
        elif way == "load" and self._checkpointer.latest() is None:
            self.save()
        elif way in {"save", "background"}:
            for old in self._checkpointer.checkpoints():
                shutil.rmtree(old.path)
        self._step += 1
        os.sync()

    def write(self) -> None:
        """Write the same bytes, one after the other, and sync the file."""
        with self._plain.open("wb", buffering=0) as file:
            for value in self._model.values:
                _write_all(file.fileno(), raw_bytes(value.detach().view(-1)))
            os.fsync(file.fileno())

    def save(self) -> None:
        """Save, and wait for it."""
        self._checkpointer.save(step=self._step, model=self._model)

    def background(self) -> float:
        """Save in the background; return the time at which the caller could go on."""
        self._checkpointer.save(step=self._step, model=self._model, background=True)
        returned = time.perf_counter()
        self._checkpointer.wait()
        return returned

    def read(self) -> None:
        """Read the plain file through."""
        read_spans(self._plain, [(0, self._plain.stat().st_size)])

    def load(self) -> None:
        """Load what was saved last."""
        self._checkpointer.load(model=self._model)


def _write_all(file: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(file, data) :]


_WAYS: dict[str, Callable[[_Bench], float | None]] = {
    "write": _Bench.write,
    "save": _Bench.save,
    "background": _Bench.background,
    "read": _Bench.read,
    "load": _Bench.load,
}


def main() -> None:
    """Take the ways that standard input names."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    bench = _Bench(given["shape"], Path(given["folder"]))
    _tell(answers, {"ready": True})
    for line in sys.stdin:
        if line.strip() == END:
            bench.close()
            _tell(answers, {})
            return
        _tell(answers, bench.take(line.strip()))


def _tell(answers: int, answer: dict[str, Any]) -> None:
    os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
