"""Downloads that are killed at any line of the code that fetches; the next start must end right.

The lines are those that a download which is left alone runs.  At each trial one or two processes
are killed, with the same cache; then one fetches the part to its end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from download_child import FILE, OPTIONS, REPO, wanted
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file

from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_source import open_hub_source

_CHILD = Path(__file__).with_name("download_child.py")
_SECONDS = 60


def kill_and_go_on(folder: Path, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield each of `count` trials, and what is wrong with it: nothing, as a rule."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    tensors = _write_model(folder / "model")
    with LoopbackHub({REPO: folder / "model"}).run() as hub:
        lines = _lines_of_a_download(hub, folder / "whole")
        for number in range(count):
            cache = folder / str(number)
            kills = [_kill(rng, lines, hub, cache) for _ in range(rng.choice((1, 1, 2)))]
            yield "killed at " + ", then ".join(kills), _wrong_with(hub, cache, tensors)


def _write_model(folder: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint of one file, and return the tensors of its part."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{place}.{number}": torch.randn(40, 60, generator=generator).to(dtype)
        for place in ("first", "middle", "last")
        for number, dtype in enumerate((torch.bfloat16, torch.float32) * 4)
    }
    folder.mkdir()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return {name: tensors[name] for name in wanted(tensors)}


def _lines_of_a_download(hub: LoopbackHub, cache: Path) -> dict[str, int]:
    """Return the lines that a download runs, and how often."""
    done = _fetch(hub, cache)
    assert done.returncode == 0, done.stderr
    lines: dict[str, int] = json.loads(done.stdout)
    return lines


def _kill(rng: random.Random, lines: dict[str, int], hub: LoopbackHub, cache: Path) -> str:
    """Let a download be killed at a line, each being as likely as the others."""
    line = rng.choice(sorted(lines))
    time = rng.randint(1, lines[line])
    done = _fetch(hub, cache, line, str(time))
    # one that goes on from where another ended, or whose threads run otherwise, may not get there
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return f"{line} ({time})" + (" (not reached)" if done.returncode == 0 else "")


def _fetch(hub: LoopbackHub, cache: Path, *fatal: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_CHILD), hub.address, str(cache), *fatal],
        check=False,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        env={**os.environ, "HF_HOME": str(cache / "home")},
    )


def _wrong_with(hub: LoopbackHub, cache: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Say what is wrong with what was left, and with what comes of going on."""
    parts = cache / "parts"
    for path in parts.rglob("*.safetensors"):
        if not _equal(load_file(path), tensors):
            return f"{path.name} was there before it was whole"
    source = open_hub_source(HubFiles(REPO, cache, endpoint=hub.address), OPTIONS)
    source.prepare(tensors)
    if not _equal({name: source.read(name) for name in tensors}, tensors):
        return "the tensors are not those of the hub"
    source.close()
    left = [path.name for path in parts.rglob("*.partial")]
    left += [path.name for path in parts.rglob("*.journal")]
    return f"left {left}" if left else ""


def _equal(found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    return found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )
