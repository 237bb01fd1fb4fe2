"""How late the event loop is: what everything in it waits for, whatever it is at."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 0.25
"""Seconds between two looks."""


async def watch_loop(observe: Callable[[float], None], interval: float = INTERVAL) -> None:
    """Report for ever how many seconds after its time a timer fires."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval
        await asyncio.sleep(interval)
        observe(max(0.0, loop.time() - due))
