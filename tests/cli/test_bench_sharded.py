"""`splitlearn bench sharded`: a small real run over two ranks."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from splitlearn_manager.cli import app


def test_a_quick_run_has_every_row_and_equal_logits(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "sharded", "--quick", "--json", "--work-dir", str(tmp_path)]
    )

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) == 5 + 4 * 3
    assert all(row["value"] >= 0 for row in rows)
    [equal] = [row for row in rows if "logits differ" in row["name"]]
    assert equal["value"] == 0
    assert equal["met"]
    assert [row["target"] for row in rows if row is not equal] == [None] * 16
