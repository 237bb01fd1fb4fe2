"""Server-sent events over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from manager_fakes import PATIENCE, until
from serving_fakes import FakeLoader, Served, trunk_config

from splitlearn_manager import AsyncModelManager
from splitlearn_manager.core import event_bus, loads
from splitlearn_manager.core.event_bus import Subscription
from splitlearn_manager.core.events import TransitionEvent
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.server import event_stream

anyio = pytest.mark.anyio


@pytest.fixture
async def served(serve: Any) -> Served:
    """Return a daemon that gives sessions and requests ten minutes at its end."""
    served: Served = await serve("late?", drain_timeout=600)
    await served.line()
    return served


class Stream:
    """A client of the stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.headers = b""

    async def start(self) -> Stream:
        self.headers = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        return self

    async def part(self) -> str:
        """Return the next chunk: one event, or a comment."""
        async with asyncio.timeout(PATIENCE):
            size = int(await self.reader.readline(), 16)
            text = (await self.reader.readexactly(size)).decode()
            await self.reader.readline()
            return text

    async def event(self) -> tuple[str, str, Any]:
        lines = (await self.part()).removesuffix("\n\n").split("\n")
        fields = dict(line.split(": ", 1) for line in lines)
        return fields["event"], fields.get("id", ""), json.loads(fields["data"])

    async def until(self, name: str) -> Any:
        """Return the data of the next event of a name."""
        while True:
            found, _, data = await self.event()
            if found == name:
                return data


async def connect(
    served: Served,
    query: str = "",
    receive_buffer: int | None = None,
    after: str | None = None,
) -> Stream:
    host, port = served.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    more = "" if after is None else f"Last-Event-ID: {after}\r\n"
    head = f"GET /v2/events{query} HTTP/1.1\r\nHost: {host}:{port}\r\n{more}\r\n"
    writer.write(head.encode())
    return Stream(reader, writer)


@anyio
async def test_the_present_state_then_every_transition(
    served: Served, manager: AsyncModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "TICK", 600)  # no word of progress, however long it takes
    stream = await (await connect(served)).start()
    assert b"200 ok" in stream.headers
    assert b"content-type: text/event-stream" in stream.headers
    assert b"cache-control: no-cache" in stream.headers
    first, second = await stream.event(), await stream.event()
    assert (first[0], first[2]["model_id"], first[2]["status"]) == ("model", "trunk", "ready")
    assert first[1] == ""  # who has not every state can't go on
    name, began, data = second
    assert (name, data) == (
        "model",
        {"model_id": "late", "status": "absent", "reason": "not loaded"},
    )
    stream_name, number = began.rsplit("-", 1)

    await manager.load_model(trunk_config("late"))
    await manager.unload_model("late")

    events = [await stream.event() for _ in range(4)]
    assert [e[1] for e in events] == [f"{stream_name}-{int(number) + n}" for n in (1, 2, 3, 4)]
    assert [(e[0], e[2]["old"], e[2]["new"]) for e in events] == [
        ("transition", "absent", "loading"),
        ("transition", "loading", "ready"),
        ("transition", "ready", "unloading"),
        ("transition", "unloading", "absent"),
    ]
    assert events[0][2]["operation_id"] == events[1][2]["operation_id"]
    stream.writer.close()


@anyio
async def test_progress_and_failed_reloads_are_told(
    served: Served, manager: AsyncModelManager, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.gate.clear()
    stream = await (await connect(served, "?model=late")).start()
    await stream.event()
    load = asyncio.create_task(manager.load_model(trunk_config("late")))
    assert (await stream.event())[0] == "transition"
    phase, progress = "", {}
    while phase != "reading" or not progress["bytes_total"]:
        name, _, progress = await stream.event()
        assert name == "progress"
        phase = progress["phase"]
    loader.gate.set()
    await load
    assert progress["bytes_total"] == 80
    await stream.until("transition")

    def cut_off(*_: object) -> None:
        raise ValueError("cut off")

    monkeypatch.setattr(loader, "load_from_config", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        await manager.reload_model(trunk_config("late"))
    assert (await stream.until("reload_failed"))["code"] == "bad_checkpoint"
    stream.writer.close()


@anyio
async def test_one_model_alone(served: Served, manager: AsyncModelManager) -> None:
    stream = await (await connect(served, "?model=late")).start()

    await manager.unload_model("trunk")
    await manager.load_model(trunk_config("late"))

    names = [(await stream.event())[2]["model_id"] for _ in range(3)]
    assert names == ["late", "late", "late"]
    stream.writer.close()


@anyio
@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("?model=..", 400, "model must be 1 to 128 letters"),
        ("?model=", 400, "model must be 1 to 128 letters"),
        ("?model=nothing", 404, "has no model 'nothing'"),
    ],
)
async def test_a_model_that_can_not_be_is_refused(
    served: Served, query: str, status: int, said: str
) -> None:
    answer = await served.ask(f"/v2/events{query}")

    assert (answer.status, said in answer.json["error"]) == (status, True)


@anyio
async def test_there_is_a_limit_on_streams(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MOST_STREAMS", 1)
    stream = await (await connect(served)).start()

    assert (await served.ask("/v2/events")).status == 429
    stream.writer.close()
    again = b"http/1.1 429"
    async with asyncio.timeout(PATIENCE):
        while again.startswith(b"http/1.1 429"):
            stream = await (await connect(served)).start()
            again = stream.headers
            stream.writer.close()


@anyio
async def test_comments_keep_it_alive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE", 0.01)
    stream = await (await connect(served, "?model=late")).start()
    await stream.event()

    assert await stream.part() == ": still here\n\n"
    assert await stream.part() == ": still here\n\n"
    stream.writer.close()


@anyio
async def test_it_ends_with_the_daemon_at_once(served: Served) -> None:
    stream = await (await connect(served, "?model=late")).start()
    await stream.event()

    assert await asyncio.wait_for(served.stop(), PATIENCE) == 0

    assert await stream.reader.read() == b"0\r\n\r\n"
    stream.writer.close()


async def fall_behind(manager: AsyncModelManager) -> Subscription:
    """Publish large events until the one reader, who does not read, has lost some."""
    await until(lambda: len(manager._table.bus) == 1)
    reader = next(iter(manager._table.bus._readers))
    event = TransitionEvent("late", 1, None, ModelStatus.LOADING, "x" * 65536, 0.0, 0.0)
    async with asyncio.timeout(PATIENCE):
        while reader._lost is None:
            for _ in range(100):
                manager._table.bus.publish(event)
            await asyncio.sleep(0)
    return reader


@anyio
async def test_a_slow_reader_is_told_what_it_lost(
    served: Served, manager: AsyncModelManager
) -> None:
    stream = await connect(served, "?model=late", receive_buffer=4096)
    reader = await fall_behind(manager)
    assert len(reader._queue) <= event_bus.QUEUE_LENGTH

    await stream.start()

    assert (await stream.until("lost"))["count"] > 0
    stream.writer.close()


@anyio
async def test_a_reader_that_does_not_read_does_not_hold_the_end(
    served: Served, manager: AsyncModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "FAREWELL", 0.05)
    stream = await connect(served, receive_buffer=4096)
    await fall_behind(manager)

    assert await asyncio.wait_for(served.stop(), PATIENCE) == 0

    stream.writer.close()


# --- Going on ------------------------------------------------------------------------------------


async def position_of(served: Served) -> str:
    """Return where a reader is that has seen every state, and goes."""
    stream = await (await connect(served)).start()
    await stream.event()
    _, position, _ = await stream.event()
    stream.writer.close()
    return position


@anyio
async def test_who_comes_back_gets_what_it_missed_and_no_states(
    served: Served, manager: AsyncModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "TICK", 600)
    position = await position_of(served)
    await manager.load_model(trunk_config("late"))
    await manager.unload_model("trunk")

    for query, expected in (
        ("", [("late", "loading"), ("late", "ready"), ("trunk", "unloading"), ("trunk", "absent")]),
        ("?model=late", [("late", "loading"), ("late", "ready")]),
    ):
        stream = await (await connect(served, query, after=position)).start()
        missed = [await stream.event() for _ in expected]
        assert [(e[2]["model_id"], e[2]["new"]) for e in missed] == expected
        stream.writer.close()

    # and goes on from any of them, with what comes after
    stream = await (await connect(served, after=missed[0][1])).start()
    assert (await stream.event())[1:] == missed[1][1:]
    await manager.unload_model("late")
    assert (await stream.event())[2]["new"] == "unloading"
    stream.writer.close()


@anyio
@pytest.mark.parametrize(
    "after", ["0badcafe-3", "nonsense", "-1", "12", "{name}-999999", "{name}-" + "9" * 4000]
)
async def test_a_position_that_is_none_is_told_and_the_states_come(
    served: Served, after: str
) -> None:
    name = (await position_of(served)).rsplit("-", 1)[0]

    stream = await (await connect(served, after=after.format(name=name))).start()

    event, position, lost = await stream.event()
    assert (event, position, lost["count"]) == ("lost", "", None)
    assert [(await stream.event())[0] for _ in range(2)] == ["model", "model"]
    stream.writer.close()


@anyio
async def test_who_was_away_too_long_is_told_how_much_it_lost(
    served: Served, manager: AsyncModelManager
) -> None:
    position = await position_of(served)
    missed = event_bus.HISTORY_LENGTH + 5
    for number in range(missed):
        event = TransitionEvent("late", number, None, ModelStatus.LOADING, "", 0.0, 0.0)
        manager._table.bus.publish(event)

    stream = await (await connect(served, after=position)).start()

    name, _, lost = await stream.event()
    assert (name, lost["count"]) == ("lost", missed)
    states = [await stream.event() for _ in range(2)]
    assert [e[0] for e in states] == ["model", "model"]
    manager._table.bus.publish(event)
    again = await (await connect(served, after=states[1][1])).start()
    assert (await again.event())[0] == (await stream.event())[0] == "transition"
    stream.writer.close()
    again.writer.close()
