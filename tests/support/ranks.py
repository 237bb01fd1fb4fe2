"""Several ranks of a process group, started by a test: what each answers comes back as JSON.

To import torch and transformers takes seconds: one process does so and forks the ranks, run after
run.  They meet through a file, and speak over loopback alone: nothing listens to the outside.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_DEADLINE = 600


@dataclass(frozen=True)
class Run:
    """One process group, from its beginning to its end.

    Attributes:
        folder: Where its ranks work; made for it.
        modules: Whose functions called `check_…` each rank calls, in their order.
        world: How many ranks.
        settings: What checks are given.
        names: Of the checks; all when left out.
        dying: The rank that kills itself.
        gpus: Whether ranks may use GPUs.
    """

    folder: str
    modules: Sequence[str]
    world: int
    settings: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] | None = None
    dying: int | None = None
    gpus: bool = False

    def answers(self) -> list[dict[str, Any]]:
        """Return what each rank answered, by check; of one that died, before that."""
        codes = json.loads((Path(self.folder) / "codes.json").read_text())
        for rank, code in enumerate(codes):
            log = (Path(self.folder) / f"{rank}.log").read_text(errors="replace")
            wanted = -9 if rank == self.dying else 0
            assert code == wanted, f"rank {rank} ended with {code}:\n{log[-3000:]}"
        files = [Path(self.folder) / f"{rank}.json" for rank in range(self.world)]
        return [json.loads(file.read_text()) for file in files if file.exists()]


def run_ranks(folder: Path, runs: Sequence[Run]) -> None:
    """Let the ranks of some runs work, one run after the other.

    Args:
        folder: Where the runs are written down.
        runs: Whose answers can be read afterwards.
    """
    orders = folder / "runs.json"
    orders.write_text(json.dumps([asdict(run) for run in runs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if any(run.gpus for run in runs):
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the other way is not for who forks
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, str(orders)]
    with (
        (folder / "ranks.log").open("w+") as log,
        subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait(_DEADLINE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks as well
        log.seek(0)
        assert code == 0, log.read()[-3000:]


def main() -> None:
    """Do the runs that a file names."""
    runs = [Run(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    for name in {name for run in runs for name in run.modules}:
        importlib.import_module(name)
    for run in runs:
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        processes = [_forked(run, rank) for rank in range(run.world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        (folder / "codes.json").write_text(json.dumps(codes))


def _forked(run: Run, rank: int) -> int:
    """Start one rank; return its process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    log = os.open(f"{run.folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        _be_rank(run, rank)
        code = 0
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _be_rank(run: Run, rank: int) -> None:
    """Join the group, call the checks, and write down what they answer."""
    from torch import distributed  # noqa: PLC0415 - imported by who forks

    from splitlearn_core.sharded import joined_group  # noqa: PLC0415 - torch

    folder = Path(run.folder)
    every = [vars(importlib.import_module(module)) for module in run.modules]
    checks: dict[str, Callable[..., Any]] = {
        n: check for found in every for n, check in found.items() if n.startswith("check_")
    }
    found: dict[str, Any] = {}
    store = f"file://{folder}/store"
    with joined_group(store, rank=rank, world_size=run.world, timeout=60):
        distributed.barrier()  # one that dies at once would be missed while others still join
        for name in run.names or checks:
            begun = time.perf_counter()
            try:
                found[name] = {"value": checks[name](folder, run.settings)}
            except Exception:  # noqa: BLE001 - told to the test, which shows it
                found[name] = {"error": traceback.format_exc()}
            print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)  # noqa: T201
            (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
