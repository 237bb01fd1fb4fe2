"""Many tasks at one model at full length, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvloop
from lifecycle_stress import Stress

_TASKS = 32
_FAILING = 0.2

_Work = Callable[[Stress], Coroutine[Any, Any, None]]


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Load and unload `count` times in each of 32 tasks, and reload about as often."""
    logging.disable(logging.CRITICAL)
    loops: dict[str, Any] = {"asyncio": None, "uvloop": uvloop.new_event_loop}
    for name, factory in loops.items():
        with asyncio.Runner(loop_factory=factory) as runner:
            yield runner.run(_pairs(name, seed, count))
        with asyncio.Runner(loop_factory=factory) as runner:
            yield runner.run(_reloads(name, seed, min(1000, count)))


async def _pairs(loop: str, seed: int, count: int) -> tuple[str, str]:
    stress = Stress(seed=seed)
    await stress.pairs(_TASKS, count)
    return _said(f"{_TASKS} tasks x {count} on {loop}", stress)


async def _reloads(loop: str, seed: int, count: int) -> tuple[str, str]:
    stress = Stress(share=_FAILING, seed=seed)
    await stress.reloads(count)
    return _said(f"{count} reloads on {loop}", stress)


def _said(what: str, stress: Stress) -> tuple[str, str]:
    loads = stress.moves["loading", "ready"]
    reloads = stress.moves["ready", "ready"]
    told = ", ".join(f"{word} {count}" for word, count in stress.told.most_common())
    figures = f"{loads} loads, {reloads} reloads, {stress.served} requests served; told {told}"
    print(f"{what}: {figures}", flush=True)
    return what, "; ".join(stress.wrong[:5])
