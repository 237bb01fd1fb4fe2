"""`splitlearn bench manager`: a small real run, and that its instruments see what they are for."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.manager_child import Lag, note_holds
from splitlearn_manager.bench.process import figures_of
from splitlearn_manager.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_a_quick_run_has_every_row_and_no_target(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "manager", "--quick", "--json", "--work-dir", str(tmp_path)]
    )

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"].partition(":")[0] for row in rows] == [
        "lock held",
        "lock held",
        "event loop late while Trunk [2, 4) of qwen2-tiny loads, cast to float32",
        "event loop late while Trunk [2, 4) of qwen2-tiny loads, cast to float32",
        "event loop late while it goes",
        "manager.infer over a bare call, qwen2-tiny, one token",
        "list of 100 models",
    ]
    assert all(row["target"] is None for row in rows)
    overhead = rows.pop(5)  # a difference: of a few calls, beside other work, it can be below 0
    assert overhead["unit"] == "us"
    assert math.isfinite(overhead["value"])
    assert all(row["value"] >= 0 for row in rows)


@pytest.mark.anyio
async def test_a_lock_that_is_held_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now = asyncio.Lock(), 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    holds = note_holds(lock)

    async with lock:
        now += 0.5
    now += 4
    async with lock:
        now += 0.25

    assert holds == [0.5, 0.25]


@pytest.mark.anyio
async def test_a_loop_that_is_late_is_seen() -> None:
    async def block() -> None:
        await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251 - that is what is to be seen
        await asyncio.sleep(0.01)

    lag = Lag()

    assert await lag.during(block()) >= 0.05
    assert max(lag.seconds) >= 0.04


def test_a_process_that_fails_is_told_of() -> None:
    with pytest.raises(BenchError, match=r"ended with 1:(.|\n)*unexpected keyword argument 'no'"):
        figures_of("splitlearn_manager.bench.manager_child", "list", no=1)
