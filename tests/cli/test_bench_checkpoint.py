"""`splitlearn bench checkpoint`: a small real run, and how its targets come about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitlearn_manager.bench import checkpoint
from splitlearn_manager.bench.checkpoint import _FULL, WAYS, _Taken, _turn
from splitlearn_manager.bench.checkpoints import QWEN2_0_5B, BenchCheckpoint
from splitlearn_manager.cli import app


def test_a_quick_run_has_every_row_and_no_target(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "checkpoint", "--quick", "--json", "--work-dir", str(tmp_path)]
    )

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len({row["name"] for row in rows}) == len(rows) == 7
    assert all(row["value"] >= 0 and row["target"] is None for row in rows)
    assert not list(tmp_path.iterdir())


def test_targets_are_of_the_same_run(tmp_path: Path) -> None:
    state = BenchCheckpoint(QWEN2_0_5B, 1, tmp_path)
    seconds = {"write": 1.0, "save": 1.3, "read": 0.5, "load": 1.0, "background": 2.0}
    rounds = {way: [_Taken(s, 0.4, 10**8)] * 3 for way, s in seconds.items()}

    rows = [row for make in checkpoint.ROWS.values() for row in make(rounds, state, _FULL)]

    by_name = {row.name.partition(" qwen2-0.5b ")[2]: row for row in rows}
    rate = by_name["saved: rate"]
    assert rate.baseline == pytest.approx(state.nbytes / 1e6)
    assert rate.target == pytest.approx(0.8 * state.nbytes / 1e6)
    assert rate.met is False
    memory = by_name["saved: peak extra anonymous memory"]
    assert (memory.target, memory.met) == (pytest.approx(151_936 * 896 * 2 / 1e6 + 64), True)
    assert by_name["saved in the background: training waits, of the save"].met is True


def test_every_way_begins_a_round_in_turn() -> None:
    assert [next(_turn(n)) for n in range(5)] == list(WAYS)
