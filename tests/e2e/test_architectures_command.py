"""`splitlearn architectures` lists what can be split."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from splitlearn_manager.cli import app


def test_as_text() -> None:
    lines = CliRunner().invoke(app, ["architectures"]).stdout.splitlines()

    assert any(line.split() == ["llama", "certified"] for line in lines)
    assert any(line.startswith("inkling2_text") and "block_states" in line for line in lines)
    assert lines[-1].endswith(" certified, in float32 and bfloat16")


def test_as_json() -> None:
    entries = json.loads(CliRunner().invoke(app, ["architectures", "--json"]).stdout)

    assert entries["mixtral"]["status"] == "certified"
    assert entries["mixtral"]["family"]["layers"] == "model.layers"
    assert entries["rwkv"]["reason"]
