"""`splitlearn plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from splitlearn_core.report import report_plan


def test_a_table_for_people(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama").path

    result = invoke("plan", path, "--split-points", 2, 4)

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{path}: llama, 6 layers, float32"
    heading, *rows = lines[3:8]
    assert heading.split()[:4] == ["part", "layers", "device", "parameters"]
    assert [row.split()[:3] for row in rows] == [
        ["bottom", "0-1", "cpu"],
        ["trunk", "2-3", "cpu"],
        ["top", "4-5", "cpu"],
        ["(whole)", "0-5", "cpu"],
    ]
    assert max(map(len, lines[1:])) <= 100
    assert "bottom -> trunk: hidden_states, 128 bytes for each token" in lines
    assert "splitting it only makes it slower" in lines[-1]
    at_home = lines.index("with Bottom and Top at home, and the Trunk elsewhere, this machine")
    assert [line.split()[0] for line in lines[at_home + 1 : at_home + 5]] == [
        *("holds", "fetches", "sends", "receives")
    ]
    assert "sends     128 bytes for each token" in lines[at_home + 3]


def test_json_for_programs(
    make_checkpoint: Callable[..., Any], command: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama").path

    result = command("plan", "--split-points", 2, 4, path, "--dtype", "bf16", "--json")

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    expected = json.loads(json.dumps(report_plan(path, [2, 4], dtype="bfloat16").to_dict()))
    now = {"available_bytes": 0}
    assert found | now == expected | now
    assert found["home"]["sent_bytes_per_token"] == 64


def test_what_can_not_fit_is_refused_with_the_figures(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama").path

    result = invoke("plan", path, "--split-points", 1, 5, "--memory", "64KiB", "--json")

    assert result.exit_code == 2
    figures = json.loads(result.stdout)
    assert figures["fits"] is False
    trunk = figures["parts"][1]
    assert not trunk["fits"]
    assert f"trunk needs {trunk['peak_bytes']:,} bytes at its peak" in result.stderr
    assert "has 65,536" in result.stderr


def test_devices(make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path
    given = ("plan", path, "--split-points", "2,4")

    assert invoke(*given, "--device-map", "auto").exit_code == 0
    refused = invoke(*given, "--device", "toaster")
    assert refused.exit_code == 2
    assert "toaster" in refused.stderr


def test_a_part_without_layers(
    make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]
) -> None:
    result = invoke("plan", make_checkpoint("llama").path, "--split-points", 0, 4, "--allow-empty")

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[4].split()[:2] == ["bottom", "none"]


def test_sizes_are_checked(make_checkpoint: Callable[..., Any], invoke: Callable[..., Any]) -> None:
    result = invoke("plan", make_checkpoint("llama").path, "--split-points", 2, 4, "--memory", "x")

    assert result.exit_code == 2
    assert result.stderr.startswith("splitlearn: --memory must be a number of bytes")
