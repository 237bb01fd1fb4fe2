"""`splitlearn split`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import SplitModel
from splitlearn_core.part_folder import check_part

IDS = torch.arange(14).reshape(2, 7)


def test_folders_that_load_by_themselves(
    make_checkpoint: Callable[..., Any], command: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama")
    out = tmp_path / "out"

    result = command("split", checkpoint.path, "--split-points", 2, 4, "--out", out, "--json")

    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout)
    assert written["out"] == str(out)
    assert [part["component"]["name"] for part in written["parts"]] == ["bottom", "trunk", "top"]
    value: Any = IDS
    for part in written["parts"]:
        files = check_part(part["folder"]).files
        assert part["files"]["model.safetensors"]["sha256"] == files["model.safetensors"].sha256
        value = SplitModel.load(part["folder"])(value)
    assert torch.equal(value.logits, checkpoint.unsplit()(IDS).logits)


def test_a_table_for_people(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    given = ("split", path, "--split-points", "2,4", "--out", tmp_path / "out", "--dtype", "bf16")

    result = invoke(*given)

    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["folder", "layers", "dtype"],
        [str(tmp_path / "out" / "bottom"), "0-1", "bfloat16"],
        [str(tmp_path / "out" / "trunk"), "2-3", "bfloat16"],
        [str(tmp_path / "out" / "top"), "4-5", "bfloat16"],
    ]


def test_a_folder_that_is_not_empty_needs_force(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    given = ("split", make_checkpoint("llama").path, "--split-points", 2, 4, "-o", tmp_path)
    assert invoke(*given).exit_code == 0

    refused = invoke(*given)
    forced = invoke(*given, "--force")

    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert forced.exit_code == 0, forced.output


def test_a_full_disk_is_exit_1(
    make_checkpoint: Callable[..., Any],
    invoke: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    path = make_checkpoint("llama").path

    result = invoke("split", path, "--split-points", 2, 4, "-o", tmp_path / "out")

    assert result.exit_code == 1
    assert "has room for 1,000" in result.stderr
    assert list(tmp_path.iterdir()) == []
