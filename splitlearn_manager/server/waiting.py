"""Waiting on behalf of a client, for as long as there is one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import Receive

T = TypeVar("T")

SHUTTING_DOWN = "the server is shutting down"

PATIENCE = 30.0
"""Seconds that a client has for sending its body, or taking its answer, besides what their length
gives it."""

BYTES_PER_SECOND = 64 * 1024
"""How much of them a client has to send, or take, on average from then on."""


async def client_gone(receive: Receive) -> None:
    """Return when the client has closed its connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(*waits: Awaitable[object]) -> set[int]:
    """Wait until the first of several ends, end the others, and return which did by themselves."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return {number for number, task in enumerate(tasks) if task.done()}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_client(
    work: asyncio.Future[T], receive: Receive, stopping: asyncio.Event
) -> T | None:
    """Wait for work that goes on without anybody waiting for it.

    Returns:
        Its result; `None` if the client goes away before.

    Raises:
        HTTPException: 503: the daemon shuts down before.
        Exception: What the work raises.
    """
    await first_of(asyncio.wait({work}), client_gone(receive), stopping.wait())
    if work.done():
        return work.result()
    work.cancel()
    await asyncio.wait({work})
    if stopping.is_set():
        raise HTTPException(503, SHUTTING_DOWN)
    return None


async def unless_gone(work: asyncio.Task[T], receive: Receive) -> T | None:
    """Wait for work that ends with the client, or with whoever waits.

    Returns:
        Its result; `None` if the client goes away before: the work is then cancelled.

    Raises:
        Exception: What the work raises.
    """
    try:
        await first_of(asyncio.wait({work}), client_gone(receive))
        return work.result() if work.done() else None
    finally:
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
