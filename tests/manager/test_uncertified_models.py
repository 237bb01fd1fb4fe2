"""The flag that lets in an architecture that was not certified, in configurations and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from typer.testing import CliRunner

from splitlearn_core.errors import UnsupportedModelError
from splitlearn_manager import ModelConfig, ModelLoader
from splitlearn_manager.cli import app
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.preflight import check_checkpoints, check_shapes

TYPE = "minimax"
FLAG = "--allow-uncertified"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(TYPE)
    tiny_model(TYPE).save_pretrained(path)
    return path


def trunk(folder: Path, **options: Any) -> ModelConfig:
    config = {"component": "trunk", "split_points": [2, 4], **options}
    return ModelConfig("m", str(folder), config=config)


def test_a_configuration_without_the_flag_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="allow_uncertified=True"):
        ModelLoader.load_from_config(trunk(folder))
    with pytest.raises(ConfigError, match="allow_uncertified"):
        check_shapes([trunk(folder)])


def test_a_configuration_with_the_flag_is_loaded(folder: Path) -> None:
    config = trunk(folder, allow_uncertified=True)

    check_shapes([config])
    check_checkpoints([config])

    assert ModelLoader.estimate(config).peak_bytes
    assert ModelLoader.load_from_config(config).start_layer == 2


@pytest.mark.parametrize(
    ("command", "more"),
    [("plan", ()), ("verify", ("--seed", "1")), ("split", ("--out", "{out}"))],
)
def test_commands_take_the_flag(
    command: str, more: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    rest = [text.format(out=tmp_path / "parts") for text in more]
    arguments = [command, str(folder), "--split-points", "2,4", *rest, "--json"]

    refused = CliRunner().invoke(app, arguments)
    done = CliRunner().invoke(app, [*arguments, FLAG])

    assert refused.exit_code == 2
    assert FLAG in refused.stderr
    assert done.exit_code == (1 if command == "verify" else 0), done.output
    assert json.loads(done.stdout)


def test_warnings_of_a_plan_are_for_people_too(tmp_path: Path) -> None:
    tiny_model("deepseek_v4").save_pretrained(tmp_path)

    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--split-points", "2,4"])

    assert "bottom -> trunk: hidden_states, input_ids, 776 bytes for each" in result.stdout
    assert "warning: input_ids (bottom -> trunk) reveals the tokens themselves" in result.stdout
    assert result.stdout.count("reveals") == 1
