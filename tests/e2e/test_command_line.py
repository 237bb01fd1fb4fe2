"""The command line: what is wrong is named, with exit code 2, and nothing heavy is imported."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitlearn_core.factory import load_component


def model(**changes: Any) -> dict[str, Any]:
    config = {"component": "trunk", "split_points": [2, 4], **changes.pop("config", {})}
    return {"model_id": "m", "model_path": "builtin:demo", "config": config, **changes}


BAD: dict[str, tuple[Any, list[str]]] = {
    "unknown key": ({"models": [model(device_type="cpu")]}, ["device_type", "models[0]"]),
    "unknown option": ({"models": [model(config={"layers": 3})]}, ["layers", "config"]),
    "wrong type": ({"server": {"port": "http"}}, ["server.port", "'http'"]),
    "no mapping": ([1, 2], ["mapping"]),
    "unknown model type": ({"models": [model(model_type="nonesuch")]}, ["nonesuch", "llama"]),
    "points out of order": ({"models": [model(config={"split_points": [4, 2]})]}, ["[4, 2]"]),
    "points out of range": (
        {"models": [model(config={"split_points": [2, 99]})]},
        ["99", "8 layers"],
    ),
    "no such folder": ({"models": [model(model_path="/no/such/model")]}, ["/no/such/model"]),
    "another architecture": ({"models": [model(model_type="gpt2")]}, ["llama", "gpt2"]),
    "beyond loopback": ({"server": {"host": "0.0.0.0"}}, ["token"]),  # noqa: S104
}


@pytest.mark.parametrize(("content", "named"), BAD.values(), ids=list(BAD))
def test_a_wrong_configuration_is_named(
    content: Any, named: list[str], tmp_path: Path, command: Callable[..., Any]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content))

    result = command("serve", "--config", path)

    assert result.returncode == 2, result.stderr
    assert all(word in result.stderr for word in [*named, "bad.yaml"]), result.stderr
    assert "Traceback" not in result.stderr


def test_a_syntax_error_has_its_line(tmp_path: Path, command: Callable[..., Any]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("server:\n  port: [1,\n")

    result = command("serve", "--config", path)

    assert result.returncode == 2
    assert "bad.yaml:3" in result.stderr


@pytest.mark.parametrize("damage", ["cut off", "tensor lost"])
def test_a_damaged_checkpoint_is_named(
    damage: str, make_checkpoint: Callable[..., Any], tmp_path: Path, command: Callable[..., Any]
) -> None:
    source = make_checkpoint("llama").path
    weights = tmp_path / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes((source / "model.safetensors").read_bytes()[:-100])
    else:
        bottom = load_component(source, "bottom", [2, 4])
        bottom.save(tmp_path)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    path = tmp_path / "daemon.yaml"
    path.write_text(yaml.safe_dump({"models": [model(model_path=str(tmp_path))]}))

    result = command("serve", "--config", path)

    assert result.returncode == 2, result.stderr
    named = "model.safetensors" if damage == "cut off" else "model.layers.2."
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken(tmp_path: Path, command: Callable[..., Any]) -> None:
    path = tmp_path / "daemon.yaml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path.write_text(yaml.safe_dump({"server": {"port": port}}))

        result = command("serve", "--config", path)

    assert result.returncode == 2, result.stderr
    assert f"127.0.0.1:{port}" in result.stderr


def test_a_trunk_that_is_not_there(command: Callable[..., Any]) -> None:
    result = command(
        "generate",
        *("--config", "configs/demo-client.yaml", "--prompt", "x"),
        *("--trunk", "http://127.0.0.1:9"),
    )

    assert result.returncode == 1
    assert "http://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_part_can_not_generate(tmp_path: Path, command: Callable[..., Any]) -> None:
    path = tmp_path / "daemon.yaml"
    path.write_text(yaml.safe_dump({"models": [model()]}))

    result = command("generate", "--config", path, "--prompt", "x")

    assert result.returncode == 1
    assert "part of a model" in result.stderr


@pytest.mark.parametrize("option", ["--top-k", "--top-p"])
def test_choosing_at_random_needs_a_temperature(command: Callable[..., Any], option: str) -> None:
    result = command("generate", "--config", "configs/demo-client.yaml", "-p", "x", option, "1")

    assert result.returncode == 2
    assert "--temperature above 0" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--config", "/no/such.yaml"]])
def test_help_and_configuration_errors_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['splitlearn', *sys.argv[1:]]\n"
        "from splitlearn_manager.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.stderr.write(f\"torch: {'torch' in sys.modules}\")"
    )

    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )

    assert result.stderr.endswith("torch: False")


@pytest.mark.parametrize("name", ["demo-trunk", "demo-client", "gpt2-trunk", "qwen2-7b-trunk"])
def test_the_configurations_that_come_along_are_sound(name: str) -> None:
    from splitlearn_manager.config.daemon_config import DaemonConfig  # noqa: PLC0415
    from splitlearn_manager.preflight import check_shapes  # noqa: PLC0415

    config = DaemonConfig.from_yaml(f"configs/{name}.yaml")
    check_shapes(config.models)

    assert len(config.models) == 1
