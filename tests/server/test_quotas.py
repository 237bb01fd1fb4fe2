"""What clients may hold: sessions, positions and bytes, each of them and all together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from joining import load_ends
from serving_fakes import FakePart, OnePart, Owner, hidden, trunk_config
from websockets.asyncio.client import connect

from splitlearn_core import SplitModel
from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.config import ServerConfig
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.observability import Metrics
from splitlearn_manager.server.security import AccessPolicy
from splitlearn_manager.serving.claims import Quota, Quotas
from splitlearn_manager.serving.errors import ClientLimitError, NoMemoryError, SessionError
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_to_wire
from splitlearn_manager.serving.wire import (
    SUBPROTOCOL,
    CloseReason,
    Frame,
    Kind,
    TensorName,
    decode,
    encode,
)

pytestmark = pytest.mark.anyio

BLOCK = 64


@pytest.fixture(scope="module")
def part() -> SplitModel:
    return load_ends("llama")[1]


class Bench:
    """Sessions of clients, in a table with quotas."""

    def __init__(self, table: SessionTable, manager: AsyncModelManager) -> None:
        self.table, self.manager = table, manager

    async def open(self, client: str = "ann", **wishes: Any) -> Session:
        return await self.table.open(Owner(), "trunk", client=client, **wishes)

    async def step(self, session: Session, new: int, rows: int = 1) -> None:
        tensor = tensor_to_wire(TensorName.HIDDEN_STATES, hidden(new, rows))
        frame = Frame(Kind.STEP, 1, session.id, session.state.length, tensors=(tensor,))
        await self.change(self.table.step, session, frame)

    async def change(self, work: Any, session: Session, *args: Any) -> Any:
        self.table.claim(session.owner, session.id)
        try:
            return await work(session, *args)
        finally:
            self.table.release(session)

    def held(self, client: str | None = None) -> tuple[int, int, int]:
        return self.table.claims.held(client)


@pytest.fixture
async def bench(request: Any, part: SplitModel) -> AsyncIterator[Bench]:
    quotas = request.param if hasattr(request, "param") else Quotas()
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    async with manager:
        await manager.load_model(trunk_config("trunk"))
        table = SessionTable(
            manager,
            max_sessions=8,
            idle_timeout=60,
            resume_timeout=60,
            metrics=Metrics(),
            quotas=quotas,
        )
        async with table:
            yield Bench(table, manager)
        assert table.claims.held() == (0, 0, 0)
        assert len(table.claims) == 0


def each(**limits: int) -> Quotas:
    return Quotas(each=Quota(**limits))


@pytest.mark.parametrize("bench", [each(sessions=2)], indirect=True)
async def test_a_client_has_so_many_sessions_and_others_theirs(bench: Bench) -> None:
    first = await bench.open()
    await bench.open()

    with pytest.raises(ClientLimitError) as caught:
        await bench.open()
    await bench.open("bob")
    bench.table.close(first, CloseReason.CLOSED)
    await bench.open()

    assert str(caught.value) == "of client ann, 2 sessions are open, and 2 may be"
    assert (caught.value.http_status, caught.value.code) == (429, "client_limit")
    assert (bench.held("ann")[0], bench.held("bob")[0], bench.held()[0]) == (2, 1, 3)


@pytest.mark.parametrize("bench", [each(sessions=1)], indirect=True)
async def test_a_fork_counts_like_a_session(bench: Bench) -> None:
    session = await bench.open()

    with pytest.raises(ClientLimitError, match="of client ann, 1 sessions are open"):
        await bench.change(bench.table.fork, session)


@pytest.mark.parametrize("bench", [each(positions=100)], indirect=True)
async def test_positions_are_counted_as_they_come(bench: Bench) -> None:
    one, other, bobs = await bench.open(), await bench.open(), await bench.open("bob")
    await bench.step(one, 30, rows=2)
    await bench.step(other, 40)

    with pytest.raises(ClientLimitError) as caught:
        await bench.step(other, 1)
    await bench.step(bobs, 100)

    assert str(caught.value) == (
        "of client ann, 1 positions more are wanted, 100 are held in 2 sessions, and 100 may be"
    )
    assert other.state.length == 40
    bench.table.close(one, CloseReason.CLOSED)
    await bench.step(other, 60)
    assert bench.held("ann")[:2] == (1, 100)


@pytest.mark.parametrize("bench", [each(positions=100)], indirect=True)
async def test_positions_that_are_asked_for_are_held_from_the_start(bench: Bench) -> None:
    session = await bench.open(max_length=40, rows=2)

    with pytest.raises(ClientLimitError, match="21 positions more are wanted, 80 are held in 1"):
        await bench.open(max_length=21)
    await bench.step(session, 40, rows=2)  # no more than was asked for

    assert bench.held("ann")[:2] == (1, 80)


@pytest.mark.parametrize("bench", [each(positions=100)], indirect=True)
async def test_rows_and_forks_hold_positions_too(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, 30)

    with pytest.raises(ClientLimitError, match="90 positions more are wanted, 30 are held"):
        await bench.change(
            bench.table.reorder, session, Frame(Kind.REORDER, 2, info={"rows": [0] * 4})
        )
    await bench.change(bench.table.fork, session)
    await bench.change(bench.table.fork, session)
    with pytest.raises(ClientLimitError, match="30 positions more are wanted, 90 are held in 3"):
        await bench.change(bench.table.fork, session)

    assert bench.held("ann")[:2] == (3, 90)


async def test_bytes_are_limited(part: SplitModel) -> None:
    assert part.kv_bytes_per_position is not None
    block = part.kv_bytes_per_position * BLOCK
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    quotas = Quotas(Quota(cache_bytes=3 * block), Quota(cache_bytes=2 * block))
    async with manager:
        await manager.load_model(trunk_config("trunk"))
        async with SessionTable(
            manager, max_sessions=8, idle_timeout=60, metrics=Metrics(), quotas=quotas
        ) as table:
            bench = Bench(table, manager)
            mine = await bench.open()
            await bench.step(mine, BLOCK, rows=2)
            with pytest.raises(ClientLimitError, match=r"of client ann, .* of cache more are"):
                await bench.step(mine, 1, rows=2)
            bobs = await bench.open("bob")
            await bench.step(bobs, BLOCK)
            with pytest.raises(NoMemoryError, match=r"of all clients, .* are held in 2 sessions"):
                await bench.step(bobs, 1)

            assert (bench.held("ann")[2], bench.held()[2]) == (2 * block, 3 * block)
            table.close(mine, CloseReason.CLOSED)
            await bench.step(bobs, 1)
            assert bench.held() == (1, BLOCK + 1, 2 * block)


@pytest.mark.parametrize("bench", [Quotas(Quota(positions=50))], indirect=True)
async def test_all_clients_together_have_a_limit(bench: Bench) -> None:
    await bench.step(await bench.open(), 30)
    bobs = await bench.open("bob")

    with pytest.raises(NoMemoryError) as caught:
        await bench.step(bobs, 21)

    assert str(caught.value) == (
        "of all clients, 21 positions more are wanted, 30 are held in 2 sessions, and 50 may be"
    )


NAMED = Quotas(each=Quota(sessions=1, positions=10), named={"ann": Quota(sessions=2)})


@pytest.mark.parametrize("bench", [NAMED], indirect=True)
async def test_a_named_client_has_its_own_limits_where_it_says_so(bench: Bench) -> None:
    await bench.open()
    mine = await bench.open()
    await bench.open("bob")

    for client, most in (("ann", 2), ("bob", 1)):
        with pytest.raises(ClientLimitError, match=f"{most} may be"):
            await bench.open(client)
    with pytest.raises(ClientLimitError, match="10 may be"):
        await bench.step(mine, 11)


async def end_by_close(bench: Bench, session: Session) -> None:
    bench.table.close(session, CloseReason.CLOSED)


async def end_by_expiry(bench: Bench, session: Session) -> None:
    del session
    bench.table.idle_timeout = -1
    bench.table.close_idle()


async def end_by_a_lost_connection(bench: Bench, session: Session) -> None:
    bench.table.close_owned(session.owner)


async def end_by_an_absence(bench: Bench, session: Session) -> None:
    session.token, bench.table.resume_timeout = "x", 0
    bench.table.close_owned(session.owner, lost=True)
    assert session.absence is not None
    await session.absence


async def end_by_unloading(bench: Bench, session: Session) -> None:
    del session
    await bench.manager.unload_model("trunk", drain_timeout=0)


async def end_by_draining(bench: Bench, session: Session) -> None:
    del session
    await bench.table.drain(0)


ENDS = [
    end_by_close,
    end_by_expiry,
    end_by_a_lost_connection,
    end_by_an_absence,
    end_by_unloading,
    end_by_draining,
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("wishes", [{}, {"max_length": 100, "rows": 3}])
async def test_whatever_ends_a_session_gives_back_what_it_held(
    bench: Bench, end: Any, wishes: Any
) -> None:
    session = await bench.open(**wishes)
    await bench.step(session, 70)
    assert bench.held("ann")[0] == 1
    assert bench.held("ann")[2] > 0

    await end(bench, session)

    assert bench.held("ann") == bench.held() == (0, 0, 0)
    assert len(bench.table.claims) == 0


@pytest.mark.parametrize("bench", [each(positions=10)], indirect=True)
async def test_what_is_refused_holds_nothing(bench: Bench) -> None:
    session = await bench.open()
    spoilt = tensor_to_wire(TensorName.HIDDEN_STATES, torch.full((1, 10, 64), torch.nan))
    frame = Frame(Kind.STEP, 1, session.id, 0, tensors=(spoilt,))

    for _ in range(3):
        with pytest.raises(SessionError, match="NaN"):
            await bench.change(bench.table.step, session, frame)
    with pytest.raises(ClientLimitError):
        await bench.open(max_length=11)

    assert bench.held("ann") == (1, 0, 0)
    await bench.step(session, 10)


# --- Through a daemon ------------------------------------------------------------------------


async def ask(socket: Any, frame: Frame) -> Frame:
    await socket.send(encode(frame))
    return decode(await asyncio.wait_for(socket.recv(decode=False), 30))


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("ANN", "anns")
    monkeypatch.setenv("BOB", "bobs")
    return [
        {"name": "ann", "token_env": "ANN", "max_sessions": 2},
        {"name": "bob", "token_env": "BOB"},
    ]


async def test_who_shows_which_token_has_which_limits(
    serve: Any, tokens: list[dict[str, Any]]
) -> None:
    served = await serve(tokens=tokens, max_sessions_per_client=1)

    async def connected(token: str) -> Any:
        return await connect(
            served.sessions_url(),
            subprotocols=[SUBPROTOCOL],
            compression=None,
            additional_headers={"Authorization": f"Bearer {token}"},
        )

    found = {}
    for name in ("ann", "bob"):
        answers = []
        for _ in range(2):  # the limit is the client's, not the connection's
            async with await connected(f"{name}s") as one, await connected(f"{name}s") as other:
                opened = [await ask(one, Frame(Kind.OPEN, 1)), await ask(other, Frame(Kind.OPEN))]
                opened.append(await ask(one, Frame(Kind.OPEN, 1)))
                answers += [a.info.get("code", "opened") for a in opened]
            await _until_none(served)
        found[name] = answers
    wrong = await served.ask("/v2", Authorization="Bearer other")
    right = await served.ask("/v2", Authorization="Bearer bobs")

    assert found == {
        "ann": ["opened", "opened", "client_limit"] * 2,
        "bob": ["opened", "client_limit", "client_limit"] * 2,
    }
    assert (wrong.status, right.status) == (401, 200)


async def test_without_tokens_a_client_is_an_address(serve: Any) -> None:
    served = await serve(max_sessions_per_client=1, max_positions_per_client=3)
    async with connect(
        served.sessions_url(), subprotocols=[SUBPROTOCOL], compression=None
    ) as socket:
        opened = await ask(socket, Frame(Kind.OPEN, 1))
        refused = await ask(socket, Frame(Kind.OPEN, 2))
        hidden_states = tensor_to_wire(TensorName.HIDDEN_STATES, torch.ones(1, 4, 4))
        long = await ask(socket, Frame(Kind.STEP, 3, opened.session, tensors=(hidden_states,)))

    assert refused.info == {
        "code": "client_limit",
        "message": "of client 127.0.0.1, 1 sessions are open, and 1 may be",
    }
    assert long.info["code"] == "client_limit"


async def _until_none(served: Any) -> None:
    async with asyncio.timeout(30):
        while served.sessions_open():  # noqa: ASYNC110 - the other side of a socket has no event
            await asyncio.sleep(0.001)


async def test_two_clients_have_two_tokens(
    tokens: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("anns")
    (tmp_path / "token").chmod(0o600)
    both = ServerConfig.from_dict({"tokens": tokens[:1], "token_file": str(tmp_path / "token")})
    with pytest.raises(ConfigError, match="a client has the same token as token_file"):
        AccessPolicy.of(both, 1)
    monkeypatch.setenv("BOB", "anns")
    with pytest.raises(ConfigError, match=r"tokens\[1\]: 'bob' has the same token as 'ann'"):
        AccessPolicy.of(ServerConfig.from_dict({"tokens": tokens}), 1)


async def test_positions_are_counted_where_bytes_are_not_known() -> None:
    """Without `kv_bytes_per_position`, positions are counted all the same."""
    fake = FakePart()
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 20), loader=OnePart(fake), single_threaded=False
    )
    async with manager:
        await manager.load_model(trunk_config("trunk"))
        async with SessionTable(
            manager,
            max_sessions=8,
            idle_timeout=60,
            metrics=Metrics(),
            quotas=each(positions=5),
        ) as table:
            bench = Bench(table, manager)
            with pytest.raises(ClientLimitError):
                await bench.open(max_length=6)
            await bench.open(max_length=5)
            assert bench.held("ann") == (1, 5, 0)
