"""The process in which the manager is measured: one task, named on its command line, and figures.

python -m splitlearn_manager.bench.manager_child TASK '{"name": value, …}'
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import torch
import uvloop

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.resources import ResourceManager

if TYPE_CHECKING:
    from splitlearn_manager.core.progress import LoadProgress

Figures = dict[str, float]

TICK = 0.001
"""Seconds between two looks at the event loop."""

_TRUNK = {"component": "trunk", "split_points": [2, 4]}
_IN_A_ROW, _WARM_UPS = 50, 10


class QuickModel:
    """A model that takes no memory to speak of."""

    component = "trunk"
    start_layer, end_layer = 2, 4
    device, dtype = "cpu", "float32"

    def __call__(self, value: Any) -> Any:
        """Return what it was given."""
        return value


class QuickLoader:
    """Loads at once, so that what is measured is the manager alone."""

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        """Return a size, the same for each."""
        del config
        return MemoryEstimate(100, 60)

    def load_from_config(self, config: ModelConfig, progress: LoadProgress | None = None) -> Any:
        """Return a model."""
        del config, progress
        return QuickModel()


def quick_manager(models: int) -> AsyncModelManager:
    """Return a manager of such models, with room for so many."""
    limit = ResourceManager(memory_limit=100 * models)
    return AsyncModelManager(limit, max_models=models, loader=QuickLoader(), eviction=True)


def quick_config(number: int) -> ModelConfig:
    """Return the configuration of one of them."""
    return ModelConfig(f"model-{number}", "nowhere", config=_TRUNK)


# --- How long the lock is held -----------------------------------------------------------------


def note_holds(lock: asyncio.Lock) -> list[float]:
    """Return a list to which a lock's every hold is added, in seconds, from now on."""
    holds: list[float] = []
    since = 0.0
    acquire, release = lock.acquire, lock.release

    async def noted_acquire() -> Any:
        nonlocal since
        got = await acquire()
        since = time.perf_counter()
        return got

    def noted_release() -> None:
        holds.append(time.perf_counter() - since)
        release()

    lock.acquire = noted_acquire  # type: ignore[method-assign]
    lock.release = noted_release  # type: ignore[method-assign]
    return holds


async def lock_holds(models: int, times: int) -> Figures:
    """Load, reload, evict and unload among so many models, all at once, again and again."""
    async with quick_manager(models) as manager:
        await asyncio.gather(*(manager.load_model(quick_config(n)) for n in range(models)))
        holds = note_holds(manager.lock)
        for turn in range(times):
            changes = _changes(manager, models, turn)
            await asyncio.gather(*changes, return_exceptions=True)  # some come too late: refused
    return {"count": len(holds), "p99": _percentile(holds, 99), "max": max(holds)}


def _changes(
    manager: AsyncModelManager, models: int, turn: int
) -> Iterator[Coroutine[Any, Any, Any]]:
    """Yield what is wanted of the manager in one turn, of each kind for a quarter of the models."""
    quarter = models // 4
    there = list(manager.models)
    new = models + turn * quarter
    for number in range(quarter):
        config = manager.models[there[-number - 1]].config
        yield manager.reload_model(config)
        yield manager.unload_model(there[number])
        yield manager.load_model(quick_config(new + number))
        yield manager.check_alive()


# --- How late the event loop is ----------------------------------------------------------------


class Lag:
    """How late the event loop comes to what is due, while a block runs."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def during(self, work: Coroutine[Any, Any, Any]) -> float:
        """Run something, and look every millisecond; return the seconds that it took."""
        looking = asyncio.create_task(self._look())
        await asyncio.sleep(10 * TICK)
        start = time.perf_counter()
        await work
        seconds = time.perf_counter() - start
        looking.cancel()
        await asyncio.wait({looking})
        return seconds

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            self.seconds.append(max(0.0, loop.time() - due))


async def loop_lag(model: str, small: str, points: list[int], dtype: str) -> Figures:
    """Load a part with a change of dtype, and unload it, after a small one of its kind."""
    loading, unloading, idle = Lag(), Lag(), Lag()
    part = {"component": "trunk", "split_points": points}
    async with AsyncModelManager() as manager:
        await manager.load_model(ModelConfig("small", small, dtype=dtype, config=_TRUNK))
        await manager.unload_model("small")
        await idle.during(asyncio.sleep(1.0))
        config = ModelConfig("large", model, dtype=dtype, config=part)
        seconds = await loading.during(manager.load_model(config))
        nbytes = (await manager.get_model_info("large")).resident_bytes
        await unloading.during(manager.unload_model("large"))
    return {
        "seconds": seconds,
        "nbytes": nbytes,
        "p99": _percentile(loading.seconds, 99),
        "max": max(loading.seconds),
        "unload_max": max(unloading.seconds),
        "idle_p99": _percentile(idle.seconds, 99),
        "idle_max": max(idle.seconds),
    }


# --- What a call through the manager costs -----------------------------------------------------


async def infer_overhead(model: str, times: int) -> Figures:
    """Call a small part by itself and through the manager, in turns of several calls each.

    In turns of one, each call would wake a processor that the other has let fall asleep.
    """
    bare: list[float] = []
    managed: list[float] = []
    async with AsyncModelManager() as manager:
        await manager.load_model(ModelConfig("part", model, config=_TRUNK))
        part = await manager.get_model("part")
        if part is None:
            raise RuntimeError("the part is not there")
        hidden = torch.zeros(1, 1, part.model.config.hidden_size, dtype=part.model.dtype)
        for _ in range(times // _IN_A_ROW + 1):
            bare += [_bare_call(part.model, hidden) for _ in range(_IN_A_ROW)][_WARM_UPS:]
            managed += [await _managed_call(manager, hidden) for _ in range(_IN_A_ROW)][_WARM_UPS:]
    return {
        "bare": _percentile(bare, 50),
        "managed": _percentile(managed, 50),
        "overhead": _percentile(managed, 50) - _percentile(bare, 50),
    }


def _bare_call(part: Any, hidden: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        part(hidden)
    return time.perf_counter() - start


async def _managed_call(manager: AsyncModelManager, hidden: torch.Tensor) -> float:
    start = time.perf_counter()
    await manager.infer("part", hidden)
    return time.perf_counter() - start


# --- How long a list takes ---------------------------------------------------------------------


async def list_time(models: int, times: int) -> Figures:
    """List so many models."""
    async with quick_manager(models) as manager:
        await asyncio.gather(*(manager.load_model(quick_config(n)) for n in range(models)))
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            listed = await manager.list_models()
            seconds.append(time.perf_counter() - start)
    if len(listed) != models:
        raise RuntimeError(f"{len(listed)} models are listed, of {models}")
    return {"median": _percentile(seconds, 50), "max": max(seconds)}


def _percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]


TASKS: dict[str, Callable[..., Coroutine[Any, Any, Figures]]] = {
    "lock": lock_holds,
    "lag": loop_lag,
    "infer": infer_overhead,
    "list": list_time,
}


def main() -> None:
    """Do the task, and answer on standard output; what libraries print goes to standard error."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    figures = uvloop.run(TASKS[sys.argv[1]](**json.loads(sys.argv[2])))
    os.write(answers, json.dumps(figures).encode() + b"\n")


if __name__ == "__main__":
    main()
