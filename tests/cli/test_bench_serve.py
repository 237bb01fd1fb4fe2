"""`splitlearn bench serve`: a small real run of servers and clients."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from typer.testing import CliRunner

from splitlearn_manager.bench import serve_peers
from splitlearn_manager.bench.checkpoints import QWEN2_TINY, BenchCheckpoint
from splitlearn_manager.bench.serve import _rate_of_peer
from splitlearn_manager.bench.serve_client import percentile
from splitlearn_manager.cli import app

if TYPE_CHECKING:
    from pathlib import Path


def test_a_quick_run_has_its_rows_and_no_target(tmp_path: Path) -> None:
    wanted = [f"--rows={row}" for row in ("prompt", "echo", "idle")]
    result = CliRunner().invoke(
        app, ["bench", "serve", "--quick", "--json", "--work-dir", str(tmp_path), *wanted]
    )

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["unit"] for row in rows] == ["x", "ms", "x", "KB", "MB"]
    assert all(row["value"] is not None and row["target"] is None for row in rows)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]

    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (
        50,
        99,
        100,
    )
    assert percentile([3.0], 1) == 3.0


def test_peers_generate_from_the_whole_model(tmp_path: Path) -> None:
    checkpoint = BenchCheckpoint(QWEN2_TINY, 1, tmp_path)
    checkpoint.make()
    work: dict[str, Any] = {"model": str(checkpoint.folder), "batch": 2, "prompt": 8, "new": 4}

    assert serve_peers.generate(**work) > 0
    assert serve_peers.continuous(**work) > 0


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    nowhere: dict[str, Any] = {
        "model": str(tmp_path / "nowhere"),
        "batch": 1,
        "prompt": 8,
        "new": 4,
    }

    rate, why = _rate_of_peer("generate", nowhere)

    assert rate is None
    assert why.startswith("it failed here: ")
    assert "nowhere" in why
