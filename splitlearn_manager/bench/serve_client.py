"""The process that has the clients while serving is measured: one task, and figures.

python -m splitlearn_manager.bench.serve_client TASK '{"name": value, …}'

Clients send hidden states that they have ready: what a person's machine computes is not measured.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from splitlearn_manager.client.websocket import WebSocket
from splitlearn_manager.serving.wire import (
    SUBPROTOCOL,
    DType,
    Frame,
    Kind,
    TensorName,
    WireTensor,
    decode,
    encode,
)

READY_SECONDS = 300

RAW_LIMIT = 8 << 20
"""Bytes that a bare stream buffers, as the frames that are measured need."""

LENGTH_BYTES = 4
"""Of the length before each message of a bare stream."""

_LONG = 1 << 30


class Client:
    """One connection, on which sessions are opened and step one after the other."""

    def __init__(self, connection: ClientConnection, hidden: tuple[int, DType]) -> None:
        self._connection = connection
        self._size, self._dtype = hidden
        self._requests = count(1)

    async def open(self) -> int:
        """Open a session."""
        answer = await self._ask(Frame(Kind.OPEN, next(self._requests)))
        return int(answer.info["session"])

    async def close(self, session: int) -> None:
        """Close one."""
        await self._ask(Frame(Kind.CLOSE, next(self._requests), session))

    async def step(self, session: int, position: int, new: int) -> float:
        """Send a step, and return the seconds until its answer was read."""
        data = memoryview(bytes(new * self._size * self._dtype.itemsize))
        tensor = WireTensor(TensorName.HIDDEN_STATES, self._dtype, (1, new, self._size), data)
        frame = Frame(Kind.STEP, next(self._requests), session, position, tensors=(tensor,))
        start = time.perf_counter()
        await self._ask(frame)
        return time.perf_counter() - start

    async def _ask(self, frame: Frame) -> Frame:
        await self._connection.send(encode(frame))
        message = await self._connection.recv(decode=False)
        answer = decode(message)
        if answer.kind is Kind.ERROR:
            raise RuntimeError(f"{frame.kind.name}: {dict(answer.info)}")
        return answer


@asynccontextmanager
async def clients(url: str, number: int, hidden: tuple[int, DType]) -> AsyncIterator[list[Client]]:
    """Connect so many clients."""
    address = f"{url.replace('http', 'ws', 1)}/v2/models/trunk/sessions"
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(
                connect(
                    address,
                    subprotocols=[Subprotocol(SUBPROTOCOL)],
                    compression=None,
                    max_size=_LONG,
                )
            )
            for _ in range(number)
        ]
        yield [Client(connection, hidden) for connection in connections]


class _PlainClient:
    """One connection as `RemoteTrunk` has it, which waits for each answer."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = WebSocket(
            socket.create_connection((address.hostname, address.port)),
            f"{url.replace('http', 'ws', 1)}/v2/models/trunk/sessions",
            subprotocol=SUBPROTOCOL,
            headers={},
            tls=None,
            handshake_timeout=READY_SECONDS,
            send_timeout=READY_SECONDS,
        )

    def ask(self, frame: Frame) -> Frame:
        """Send a frame, and return its answer."""
        self._socket.send(encode(frame))
        answer = decode(self._socket.receive(READY_SECONDS))
        if answer.kind is Kind.ERROR:
            raise RuntimeError(f"{frame.kind.name}: {dict(answer.info)}")
        return answer

    def close(self) -> None:
        """Say good-bye."""
        self._socket.close()


async def streams(
    url: str, hidden: list[Any], sessions: int, prompt: int, new: int
) -> dict[str, Any]:
    """Let each client send a prompt and then position after position, all at once."""
    kind = _hidden(hidden)
    async with clients(url, sessions, kind) as all_clients:
        opened = [await client.open() for client in all_clients]
        start = time.perf_counter()
        latencies = await asyncio.gather(
            *(
                _stream(client, session, prompt, new)
                for client, session in zip(all_clients, opened, strict=True)
            )
        )
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "steps": [s for one in latencies for s in one[1:]]}


async def _stream(client: Client, session: int, prompt: int, new: int) -> list[float]:
    """Return the seconds of the prompt and of each position."""
    latencies = [await client.step(session, 0, prompt)]
    latencies += [await client.step(session, prompt + n, 1) for n in range(new)]
    return latencies


async def beside_a_prompt(
    url: str, hidden: list[Any], sessions: int, prompt: int, long_prompt: int, usual: int
) -> dict[str, Any]:
    """Let clients step; after so many steps of each, another one comes with a long prompt."""
    async with clients(url, sessions + 1, _hidden(hidden)) as (newcomer, *others):
        opened = [await client.open() for client in others]
        await asyncio.gather(*(c.step(s, 0, prompt) for c, s in zip(others, opened, strict=True)))
        before: list[float] = []
        during: list[float] = []
        arrived, settled = asyncio.Event(), asyncio.Event()

        async def walk(client: Client, session: int) -> None:
            for position in count(prompt):
                log = during if arrived.is_set() else before
                log.append(await client.step(session, position, 1))
                if len(before) >= usual * sessions:
                    settled.set()
                if finished.done():
                    return

        async def come() -> float:
            session = await newcomer.open()
            await settled.wait()
            arrived.set()
            return await newcomer.step(session, 0, long_prompt)

        finished = asyncio.ensure_future(come())
        await asyncio.gather(*(walk(c, s) for c, s in zip(others, opened, strict=True)))
        return {"usual": before, "during": during, "prompt_seconds": await finished}


async def echoes(
    url: str, port: int, hidden: list[Any], positions: int, times: int
) -> dict[str, Any]:
    """Send steps to a part without layers, and as many bytes to bare streams, in turns.

    Steps go the way of `RemoteTrunk`, over its own WebSocket.
    """
    size, dtype = _hidden(hidden)
    message = bytes(positions * size * dtype.itemsize)
    head = len(message).to_bytes(LENGTH_BYTES, "little")
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=RAW_LIMIT)
    steps, raw = [], []
    trunk = _PlainClient(url)
    session = trunk.ask(Frame(Kind.OPEN, 1)).info["session"]
    shape = (1, positions, size)
    for number in range(times):
        tensor = WireTensor(TensorName.HIDDEN_STATES, dtype, shape, memoryview(message))
        step = Frame(Kind.STEP, 2 + number, session, number * positions, tensors=(tensor,))
        start = time.perf_counter()
        trunk.ask(step)
        steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        writer.write(head + message)
        await writer.drain()
        await reader.readexactly(LENGTH_BYTES + len(message))
        raw.append(time.perf_counter() - start)
    trunk.close()
    writer.close()
    return {"steps": steps, "raw": raw}


async def idle(url: str, hidden: list[Any], sessions: int, pid: int, cycles: int) -> dict[str, Any]:
    """Hold sessions that do nothing, and then open and close many."""
    connections = 20
    async with clients(url, connections, _hidden(hidden)) as all_clients:
        await all_clients[0].close(await all_clients[0].open())
        before = _anonymous(pid)
        opened = [(c, await c.open()) for c in all_clients for _ in range(sessions // connections)]
        held = _anonymous(pid)
        for client, session in opened:
            await client.close(session)
        flat: list[int] = []
        for number in range(cycles):
            client = all_clients[number % connections]
            await client.close(await client.open())
            if number % (cycles // 10) == cycles // 10 - 1:
                flat.append(_anonymous(pid))
    return {"before": before, "held": held, "flat": flat}


async def held(url: str, hidden: list[Any], sessions: int, pid: int, prompt: int) -> dict[str, Any]:
    """Let sessions hold a prompt each."""
    async with clients(url, 1, _hidden(hidden)) as (client,):
        # Two first ones bring what any forward of that size needs, and what is kept between two.
        for session in [await client.open() for _ in range(2)]:
            await client.step(session, 0, prompt)
            await client.close(session)
        before = _anonymous(pid)
        for _ in range(sessions):
            await client.step(await client.open(), 0, prompt)
        return {"bytes": _anonymous(pid) - before}


async def wait_until_ready(url: str) -> dict[str, Any]:
    """Wait until the daemon has what it should have."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if await asyncio.to_thread(_is_ready, url):
            return {}
        await asyncio.sleep(0.1)
    raise TimeoutError(f"{url} was not ready after {READY_SECONDS} s")


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/v2/health/ready") as answer:  # noqa: S310 - a daemon of our own
            return bool(answer.status == 200)  # noqa: PLR2004
    except OSError:
        return False


def _hidden(hidden: list[Any]) -> tuple[int, DType]:
    size, dtype = hidden
    return int(size), DType.from_torch_name(dtype)


def _anonymous(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:  # noqa: PTH123 - as proc(5) has it
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def percentile(values: list[float], percent: float) -> float:
    """Return the value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


TASKS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, Any]]]] = {
    "ready": wait_until_ready,
    "streams": streams,
    "beside": beside_a_prompt,
    "echoes": echoes,
    "idle": idle,
    "held": held,
}


def main() -> None:
    """Do the task, and answer on standard output."""
    figures = uvloop.run(TASKS[sys.argv[1]](**json.loads(sys.argv[2])))
    left = memoryview(json.dumps(figures).encode() + b"\n")
    while left:  # a pipe takes 64 KiB at a time
        left = left[os.write(sys.stdout.fileno(), left) :]


if __name__ == "__main__":
    main()
