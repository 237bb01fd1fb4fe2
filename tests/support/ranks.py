"""Several ranks of a process group, started by a test: what each answers comes back as JSON.

Each rank is a fresh process that imports torch, so that one start is shared by many checks.  They
meet through a file, and speak over loopback alone: nothing listens to the outside.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
_DEADLINE = 110


def start_ranks(
    module: str,
    world: int,
    folder: Path,
    settings: dict[str, Any],
    *,
    names: list[str] | None = None,
) -> list[subprocess.Popen[bytes]]:
    """Start the ranks; each runs the checks of a module of ours, and writes what they answer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"names": names, **settings}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [_started(module, rank, world, folder, environment) for rank in range(world)]


def _started(
    module: str, rank: int, world: int, folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, module, str(rank), str(world), str(folder)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def answers(processes: list[subprocess.Popen[bytes]], folder: Path) -> list[dict[str, Any]]:
    """Wait for the ranks, and return what each answered."""
    try:
        for rank, process in enumerate(processes):
            code = process.wait(timeout=_DEADLINE)
            log = (folder / f"{rank}.log").read_text(errors="replace")
            assert code == 0, f"rank {rank} ended with {code}:\n{log[-3000:]}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(len(processes))]


def run_ranks(
    module: str, world: int, folder: Path, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Start the ranks, and wait for them."""
    return answers(start_ranks(module, world, folder, settings), folder)


def checks_of(module: str) -> dict[str, Callable[..., Any]]:
    """Return the functions of a module that are called `check_…`, in their order."""
    found = vars(importlib.import_module(module))
    return {name: value for name, value in found.items() if name.startswith("check_")}


def main() -> None:
    """Be one rank."""
    module, rank, world, name = sys.argv[1:]
    folder = Path(name)
    settings = json.loads((folder / "settings.json").read_text())
    from splitlearn_core.sharded import joined_group  # noqa: PLC0415 - torch, once it is needed

    names = settings.pop("names")
    found: dict[str, Any] = {}
    with joined_group(f"file://{folder}/store", rank=int(rank), world_size=int(world), timeout=60):
        for key, check in checks_of(module).items():
            if names is not None and key not in names:
                continue
            try:
                found[key] = {"value": check(folder, settings)}
            except Exception:  # noqa: BLE001 - told to the test, which shows it
                found[key] = {"error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
