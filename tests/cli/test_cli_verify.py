"""`splitlearn verify`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from splitlearn_core import SplitModel
from splitlearn_core.split_checkpoint import split_checkpoint


def test_equal_parts_are_exit_0(
    make_checkpoint: Callable[..., Any], command: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama").path

    result = command("verify", path, "--split-points", 2, 4, "--json")

    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["mode"] == "whole"
    assert [check["status"] for check in report["checks"]] == ["equal"] * 6
    assert "Loading weights" not in result.stderr, "bars are for people"


def test_layer_by_layer(make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]) -> None:
    result = invoke(
        "verify", make_checkpoint("gpt2").path, "--split-points", "1,3,5", "--layerwise"
    )

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[2] == "layerwise: asked for"
    assert "greedy generate  skipped" in result.stdout
    assert lines[-1].startswith("the parts compute what the unsplit model computes")


def test_wrong_parts_are_exit_1(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    split_checkpoint(path, [2, 4], tmp_path)
    assert invoke("verify", path, "--parts", tmp_path).exit_code == 0
    trunk = SplitModel.load(tmp_path / "trunk")
    with torch.no_grad():
        next(trunk.parameters()).view(-1)[0] += 1
    trunk.save(tmp_path / "trunk")

    result = invoke("verify", path, "--parts", tmp_path)

    assert result.exit_code == 1
    assert "hidden states: first at after trunk" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("the parts do NOT compute")


def test_split_points_or_parts_are_needed(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]
) -> None:
    result = invoke("verify", make_checkpoint("llama").path)

    assert result.exit_code == 2
    assert "at least two" in result.stderr
