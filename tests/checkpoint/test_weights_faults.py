"""Saving weights that is killed, or meets a full disk, leaves the old file or the new one."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from splitlearn_core.checkpoint import save_weights
from splitlearn_core.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 512


def filled(value: float) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value_of(path: Path) -> float:
    """Return the one value that all tensors of a whole file have."""
    values = {float(v) for tensor in load_file(path).values() for v in tensor.unique()}
    assert len(values) == 1
    return values.pop()


def unfinished(folder: Path) -> int:
    """Return the length of what is being written."""
    lengths = [p.stat().st_size for p in folder.glob(".*.tmp") if p.exists()]
    return max(lengths, default=-1)


def killed_while_saving(model: nn.Module, path: Path, at: int) -> bool:
    """Save in a child that is killed when so much is written; return whether it was in time."""
    child = os.fork()
    if child == 0:
        save_weights(model, path)
        os._exit(0)
    while unfinished(path.parent) < at:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_save_that_is_killed_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "w.safetensors"
    save_weights(filled(0.0), path)
    length, draw, kept = path.stat().st_size, random.Random(1), 0.0  # noqa: S311 - no secret
    killed = 0

    for number in range(1, 21):
        killed += killed_while_saving(filled(number), path, draw.randrange(length))
        found = value_of(path)
        assert found in {kept, float(number)}
        kept = found
        for left in tmp_path.glob(".*.tmp"):
            left.unlink()

    assert killed > 10


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file become longer than a part of the weights, and a write that would fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * SIZE * SIZE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_may_not_grow_leaves_the_old_one(
    tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    path = tmp_path / name
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()
    request.getfixturevalue("small_files")

    with pytest.raises(StorageError, match=r"can't be saved to .*w\..*as it was"):
        save_weights(filled(1.0), path)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_one_tensor_is_in_memory_beside_the_model(tmp_path: Path) -> None:
    """A model of 128 MiB in tensors of 16, cast to half: less than the file's 64 is added."""
    code = f"""
import threading, torch
from torch import nn
from splitlearn_core.checkpoint import save_weights
torch.set_num_threads(1)
model = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(8))
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
before, peaks, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        peaks.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
save_weights(model, {str(tmp_path / "w.safetensors")!r}, "float16")
done.set()
watcher.join()
print(max(peaks) - before)
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert float(printed) < 48
