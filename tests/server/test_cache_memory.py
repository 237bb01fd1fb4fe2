"""Memory for the caches of sessions: reserved beside that of models, or refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from joining import load_ends
from serving_fakes import OnePart, Owner, hidden, trunk_config

from splitlearn_core import SplitModel
from splitlearn_core.cache import PartCache
from splitlearn_core.page_sizes import PAGE
from splitlearn_manager import AsyncModelManager, ResourceManager
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving.errors import BadOpenError, NoMemoryError
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_to_wire
from splitlearn_manager.serving.wire import CloseReason, Frame, Kind, TensorName

pytestmark = pytest.mark.anyio

BLOCK = 64
BLOCKS = 5
"""How many blocks of one row there is memory for, beside the model."""


@pytest.fixture(scope="module")
def part() -> SplitModel:
    return load_ends("llama")[1]


class Bench:
    def __init__(self, manager: AsyncModelManager, table: SessionTable, part: SplitModel) -> None:
        self.manager, self.table = manager, table
        assert part.kv_bytes_per_position is not None
        self.block = part.kv_bytes_per_position * BLOCK

    async def open(self, **wishes: Any) -> Session:
        return await self.table.open(Owner(), "trunk", **wishes)

    async def step(self, session: Session, new: int, rows: int = 1) -> None:
        tensor = tensor_to_wire(TensorName.HIDDEN_STATES, hidden(new, rows))
        frame = Frame(Kind.STEP, 1, session.id, session.state.length, tensors=(tensor,))
        await self.change(self.table.step, session, frame)

    async def change(self, work: Any, session: Session, frame: Frame) -> None:
        self.table.claim(session.owner, session.id)
        try:
            await work(session, frame)
        finally:
            self.table.release(session)

    def blocks(self) -> float:
        """Return how many blocks are reserved for sessions."""
        usage = self.manager.resource_manager.get_current_usage()
        return (usage.reserved_bytes - self.model_bytes) / self.block

    model_bytes = 0


@pytest.fixture
async def bench(part: SplitModel) -> AsyncIterator[Bench]:
    assert part.kv_bytes_per_position is not None
    room = part.resident_bytes() + BLOCKS * BLOCK * part.kv_bytes_per_position
    resources = ResourceManager(memory_limit=room)
    loader = OnePart(part)
    async with AsyncModelManager(resources, loader=loader, single_threaded=False) as manager:
        await manager.load_model(trunk_config("trunk"))
        table = SessionTable(manager, max_sessions=9, idle_timeout=60, metrics=Metrics())
        async with table:
            bench = Bench(manager, table, part)
            bench.model_bytes = resources.get_current_usage().reserved_bytes
            yield bench


def test_the_figure_is_what_a_cache_takes(part: SplitModel) -> None:
    cache = part.new_cache()
    assert isinstance(cache, PartCache)
    with torch.inference_mode():
        part(hidden(BLOCK + 1, rows=2), past_key_values=cache)

    assert part.kv_bytes_per_position is not None
    held = 2 * (BLOCK + 1) * part.kv_bytes_per_position
    assert held <= cache.allocated_nbytes < held + held // BLOCK + PAGE  # a line between positions


async def test_a_length_that_is_wanted_is_reserved_at_once(bench: Bench) -> None:
    session = await bench.open(max_length=BLOCK + 1)
    assert bench.blocks() == 2
    await bench.step(session, BLOCK + 1)
    assert bench.blocks() == 2

    with pytest.raises(NoMemoryError, match="would take"):
        await bench.open(max_length=2 * BLOCK, rows=2)
    assert len(bench.table) == 1
    other = await bench.open(max_length=BLOCK, rows=3)
    assert bench.blocks() == BLOCKS

    bench.table.close(session, CloseReason.CLOSED)
    assert bench.blocks() == 3
    bench.table.close(other, CloseReason.CLOSED)
    assert bench.blocks() == 0


async def test_another_reserves_what_it_takes_and_a_step_that_does_not_fit_is_refused(
    bench: Bench,
) -> None:
    small, large = await bench.open(), await bench.open()
    assert bench.blocks() == 0
    await bench.step(small, 1)
    await bench.step(large, BLOCK - 1, rows=4)
    assert bench.blocks() == BLOCKS
    await bench.step(large, 1, rows=4)

    with pytest.raises(NoMemoryError, match="sessions of 'trunk' have"):
        await bench.step(large, 1, rows=4)
    assert large.state.length == BLOCK
    await bench.step(small, BLOCK - 1)

    bench.table.close(small, CloseReason.CLOSED)
    bench.table.close(large, CloseReason.CLOSED)
    assert bench.blocks() == 0


async def test_rows_and_forks_take_memory_too(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, 3)
    rows = Frame(Kind.REORDER, 2, session.id, info={"rows": [0, 0, 0]})
    await bench.change(bench.table.reorder, session, rows)
    assert bench.blocks() == 3

    bench.table.claim(session.owner, session.id)
    with pytest.raises(NoMemoryError):
        await bench.table.fork(session)
    bench.table.release(session)
    assert bench.blocks() == 3
    more = Frame(Kind.REORDER, 3, session.id, info={"rows": [0] * 6})
    with pytest.raises(NoMemoryError):
        await bench.change(bench.table.reorder, session, more)
    assert session.state.batch == 3


async def test_sessions_count_where_models_are_admitted(bench: Bench) -> None:
    before = bench.manager.resource_manager.check_available_resources(bench.block)
    session = await bench.open(max_length=2 * BLOCK)
    await bench.step(session, 1)
    usage = bench.manager.resource_manager.get_current_usage()

    assert before
    assert usage.reservations["trunk"] == bench.model_bytes + 2 * bench.block
    assert not bench.manager.resource_manager.is_changing("cpu")


@pytest.mark.parametrize("length", [0, -1, True, 1.5])
async def test_lengths_that_are_none(bench: Bench, length: Any) -> None:
    with pytest.raises(BadOpenError, match="max_length"):
        await bench.open(max_length=length)
    assert bench.blocks() == 0


async def test_sessions_of_a_model_with_a_budget_share_it_and_no_more(part: SplitModel) -> None:
    assert part.kv_bytes_per_position is not None
    block = part.kv_bytes_per_position * BLOCK
    resources = ResourceManager(memory_limit=part.resident_bytes() + 9 * block)
    config = trunk_config("trunk", kv_cache_memory=2 * block)
    loader = OnePart(part)
    async with AsyncModelManager(resources, loader=loader, single_threaded=False) as manager:
        await manager.load_model(config)
        reserved = resources.get_current_usage().reserved_bytes
        assert reserved == part.resident_bytes() + 2 * block
        table = SessionTable(manager, max_sessions=9, idle_timeout=60, metrics=Metrics())
        async with table:
            bench = Bench(manager, table, part)
            await bench.open(max_length=BLOCK)
            growing = await bench.open()
            await bench.step(growing, BLOCK)

            with pytest.raises(NoMemoryError, match="that its kv_cache_memory gives them"):
                await bench.step(growing, 1)
            with pytest.raises(NoMemoryError, match="kv_cache_memory"):
                await bench.open(max_length=1)

            info = await manager.get_model_info("trunk")
            assert (info.kv_cache_budget, info.kv_cache_bytes) == (2 * block, 2 * block)
            assert growing.state.length == BLOCK
            assert resources.get_current_usage().reserved_bytes == reserved
        assert (await manager.get_model_info("trunk")).kv_cache_bytes == 0
