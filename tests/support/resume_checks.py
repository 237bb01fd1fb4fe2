"""What several ranks do to show that they save and go on together; see `ranks`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from save_faults.disks import FullDisk
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from splitlearn_core.checkpoint.files.disk import Disk
from splitlearn_core.checkpoint.resume import Checkpointer
from splitlearn_core.checkpoint.training import exchange
from splitlearn_core.checkpoint.training.sampler import ResumableSampler
from splitlearn_core.errors import RankLostError, SplitLearnError

_TIMEOUT = 1.0
_SLOW_PIECES, _PIECE_SECONDS = 5, 0.4


def _error_of(act: Callable[[], Any]) -> str:
    """Return the type and text of an error."""
    try:
        act()
    except SplitLearnError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _draw() -> list[float]:
    return [float(torch.rand(())), random.random()]  # noqa: S311 - no secret


def check_each_rank_gets_its_own_back(folder: Path, _: dict[str, Any]) -> dict[str, Any]:
    """Save with DDP, draw, and load again."""
    rank = dist.get_rank()
    random.seed(rank)
    torch.manual_seed(rank)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 3))
    torch.manual_seed(100 + rank)
    weight = model.module.weight.detach().clone()
    with Checkpointer(folder / "own", timeout=30) as checkpointer:
        path = checkpointer.save(step=4, model=model, rank_values={"rank": rank})
        drawn = _draw()
        with torch.no_grad():
            model.module.weight.zero_()
        state = checkpointer.load(model=model)
        background = checkpointer.save(step=5, model=model, background=True)
        later = checkpointer.wait()
    return {
        "path": str(path),
        "drawn": drawn,
        "again": _draw(),
        "weights": torch.equal(model.module.weight, weight),
        "values": list(state.rank_values),
        "background": background,
        "later": str(later),
        "notes": state.notes,
    }


def check_a_disk_that_is_full(folder: Path, _: dict[str, Any]) -> str:
    """Only rank 0 writes; the other one hears of it."""
    checkpointer = Checkpointer(folder / "full", timeout=30, disk=FullDisk(2))
    return _error_of(lambda: checkpointer.save(step=1))


def check_a_full_disk_in_the_background(folder: Path, _: dict[str, Any]) -> str:
    """The other one hears of it when it waits."""
    checkpointer = Checkpointer(folder / "full", timeout=30, disk=FullDisk(2))
    checkpointer.save(step=1, background=True)
    return _error_of(checkpointer.wait)


class _SlowDisk(Disk):
    """A disk that takes longer for all than others wait, and less for each piece."""

    def __init__(self) -> None:
        self._pieces = 0

    def write(self, file: int, data: memoryview) -> int:
        """See `Disk`; the first pieces take their time."""
        self._pieces += 1
        if self._pieces <= _SLOW_PIECES:
            time.sleep(_PIECE_SECONDS)
        return super().write(file, data)


def check_a_save_that_takes_longer_than_the_timeout(folder: Path, _: dict[str, Any]) -> str:
    """Rank 0 gets on, so that the other waits."""
    with patch.object(exchange, "_GRACE", 0.0), patch.object(exchange, "_SIGN_SECONDS", 0.0):
        checkpointer = Checkpointer(folder / "slow", timeout=_TIMEOUT, disk=_SlowDisk())
        return str(checkpointer.save(step=1))


def check_a_rank_that_can_not_save(folder: Path, _: dict[str, Any]) -> list[str]:
    """Rank 1 has something that can't be written; the next save is well."""
    checkpointer = Checkpointer(folder / "bad", timeout=30)
    bad = print if dist.get_rank() else None
    first = _error_of(lambda: checkpointer.save(step=1, rank_values=bad))
    return [first, str(checkpointer.save(step=2))]


def check_a_rank_that_does_not_come(folder: Path, _: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 stays away from the first save, and finds rank 0 away from the second."""
    checkpointer = Checkpointer(folder / "away", timeout=_TIMEOUT)
    begin = time.monotonic()
    errors = []
    for away in (1, 0):
        if dist.get_rank() == away:
            next(exchange._exchanges)
            dist.barrier()
        else:
            errors.append(_error_of(lambda: checkpointer.save(step=1)))
            dist.barrier()
    return {"errors": errors, "seconds": time.monotonic() - begin}


def check_damage_that_one_rank_sees(folder: Path, _: dict[str, Any]) -> dict[str, Any]:
    """All fall back together, or none loads."""
    rank = dist.get_rank()
    run = folder / "damage"
    with Checkpointer(run, timeout=30) as checkpointer:
        checkpointer.save(step=1)
        path = checkpointer.save(step=2)
    assert path is not None
    # each rank reads through a folder of its own, as where the network's file system fails
    mine = folder / f"damage-{rank}"
    mine.mkdir()
    for name in ("000001-step-1", "000002-step-2"):
        (mine / name).mkdir()
        for file in (run / name).iterdir():
            content = file.read_bytes()
            is_bad = rank == 1 and name.endswith("2") and file.name == "training.json"
            (mine / name / file.name).write_bytes(content[:-1] if is_bad else content)
    dist.barrier()
    reader = _Here(run, mine)
    error = _error_of(reader.load)
    state = reader.load(fallback=True)
    return {"error": error, "step": state.step, "notes": state.notes}


class _Here(Checkpointer):
    """Reads the checkpoints of one folder in another."""

    def __init__(self, folder: Path, here: Path) -> None:
        super().__init__(folder, timeout=30)
        self._here = here

    def _candidates(self, *given: Any, **more: Any) -> Any:
        found = super()._candidates(*given, **more)
        return [type(c).at(self._here / c.path.name) for c in found]


def check_a_changed_number_of_ranks(_: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Go on with what one rank saved."""
    results: dict[str, Any] = {}
    for policy in (None, "constant_global_batch", "constant_batch_per_rank"):
        sampler = ResumableSampler(64, 2)
        checkpointer = Checkpointer(settings["single"], timeout=30)
        try:
            state = checkpointer.load(sampler=sampler, on_world_change=policy)
        except SplitLearnError as error:
            results[str(policy)] = str(error)
        else:
            results[str(policy)] = {
                "step": state.step,
                "accumulation": sampler.accumulation,
                "consumed": sampler.consumed,
                "notes": state.notes,
                "next": next(iter(sampler)),
            }
    return results


def sharded_model(seed: int, *, shard: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model of a few layers, shared out over the ranks, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    if shard:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def sharded_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    """Take a step, with the same samples on each rank; return the loss."""
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    loss = model(values).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def check_a_model_in_shares(folder: Path, _: dict[str, Any]) -> dict[str, Any]:
    """Each rank writes and reads its own share; a full disk leaves nothing."""
    model, optimizer = sharded_model(0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    things = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    sharded_step(model, optimizer, 0)
    scheduler.step()
    checkpointer = Checkpointer(folder / "shares", timeout=30)
    path = checkpointer.save(step=1, rank_values=dist.get_rank(), **things)
    expected = [sharded_step(model, optimizer, number) for number in (1, 2)]
    other, fresh = sharded_model(7)
    again = {
        "model": other,
        "optimizer": fresh,
        "scheduler": torch.optim.lr_scheduler.StepLR(fresh, 1),
    }
    state = checkpointer.load(**again)
    full = Checkpointer(folder / "shares-full", timeout=30, disk=FullDisk(6))
    return {
        "path": str(path),
        "expected": expected,
        "found": [sharded_step(other, fresh, number) for number in (1, 2)],
        "values": state.rank_values,
        "full": _error_of(lambda: full.save(step=2, **things)),
        "left": [p.name for p in (folder / "shares-full").glob("[!.]*")],
        "background": _refusal(lambda: checkpointer.save(step=2, background=True, **things)),
        "optimizer": _error_of(
            lambda: checkpointer.load(optimizer=fresh, skip=["model", "scheduler"])
        ),
    }


def _refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except (ValueError, RankLostError) as error:
        return str(error)
    return ""


def check_z_death(folder: Path, settings: dict[str, Any]) -> str:
    """One rank dies before the save; the other ends with an error that names it."""
    checkpointer = Checkpointer(folder / "death", timeout=_TIMEOUT)
    if dist.get_rank() == settings["dies"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return _error_of(lambda: checkpointer.save(step=1))
