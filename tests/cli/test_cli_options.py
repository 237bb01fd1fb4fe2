"""What the commands about models have in common: split points, and how they fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

from splitlearn_core.errors import FetchError, HubUnreachableError, StorageError
from splitlearn_manager.commands.errors import told_in_one_line
from splitlearn_manager.commands.options import parse_points, spread
from splitlearn_manager.commands.tables import table

COMMANDS = ["plan", "verify", "split"]


def arguments_of(command: str, out: object) -> list[object]:
    """Return what a command needs beside a model and split points."""
    return ["--out", out] if command == "split" else []


@pytest.mark.parametrize(
    ("given", "points"),
    [
        (["--split-points", "8", "24"], (8, 24)),
        (["--split-points", "8,24"], (8, 24)),
        (["--split-points=8,24"], (8, 24)),
        (["--split-points=8", "16", "24"], (8, 16, 24)),
        (["--split-points", "8,", "24"], (8, 24)),
        (["--split-points", "8", "--split-points", "24"], (8, 24)),
    ],
    ids=str,
)
def test_forms_of_split_points(given: list[str], points: tuple[int, ...]) -> None:
    option = "--split-points"
    values = [value.removeprefix(f"{option}=") for value in spread(given) if value != option]

    assert parse_points(values) == points


def test_numbers_elsewhere_are_left_alone() -> None:
    arguments = ["model", "--split-points", "8", "24", "--seed", "3", "5"]

    assert spread(arguments) == [
        *("model", "--split-points", "8", "--split-points", "24", "--seed", "3", "5")
    ]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--split-points", "4", "2"], "[4, 2]"),
        (["--split-points", "2", "99"], "6 layers"),
        (["--split-points", "2"], "at least two"),
        (["--split-points", "two"], "two"),
        (["--split-points", "2", "4", "--dtype", "int8"], "float32, float16"),
        (["--split-points", "2", "4", "--model-type", "gpt2"], "llama model, not gpt2"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_exit_2(
    command: str,
    given: list[str],
    named: str,
    make_checkpoint: Callable[..., Any],
    invoke: Callable[..., Any],
    tmp_path: Any,
) -> None:
    more = arguments_of(command, tmp_path / "out")

    result = invoke(command, make_checkpoint("llama").path, *given, *more)

    assert result.exit_code == 2
    assert result.stderr.startswith("splitlearn: ")
    assert result.stderr.count("\n") == 1
    assert named in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", ["none there", "tensor lost", "unknown architecture"])
def test_a_model_that_can_not_be_used_is_named(
    command: str,
    damage: str,
    damaged: Callable[..., Any],
    invoke: Callable[..., Any],
    tmp_path: Any,
) -> None:
    if damage == "none there":
        path, named = "/no/such/model", "/no/such/model"
    elif damage == "tensor lost":
        path, named = damaged("llama", drop=("model.norm.weight",)).path, "model.norm.weight"
    else:
        path, named = damaged("llama", config={"model_type": "nonesuch"}).path, "nonesuch"
    more = arguments_of(command, tmp_path / "out")

    result = invoke(command, path, "--split-points", 2, 4, *more)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("splitlearn: ")
    assert named in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("kind", [FetchError, HubUnreachableError, StorageError, OSError])
def test_what_may_pass_is_exit_1(capsys: pytest.CaptureFixture[str], kind: type[Exception]) -> None:
    with pytest.raises(typer.Exit) as caught, told_in_one_line():
        raise kind("the hub\nis down")

    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "splitlearn: the hub is down\n"


def test_errors_of_the_program_itself_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError), told_in_one_line():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "given", [["--help"], ["MODEL", "--split-points", "2", "99"], ["x", "--split-points", "4", "2"]]
)
def test_help_and_wrong_usage_import_no_torch(
    command: str, given: list[str], make_checkpoint: Callable[..., Any]
) -> None:
    model = str(make_checkpoint("llama").path)
    given = [model if text == "MODEL" else text for text in given]
    more = ["--out", "x"] if command == "split" else []
    code = (
        "import sys; sys.argv = ['splitlearn', *sys.argv[1:]]\n"
        "from splitlearn_manager.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.stderr.write(f\"torch: {'torch' in sys.modules}\")"
    )

    result = subprocess.run(
        [sys.executable, "-c", code, command, *given, *more],
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stderr.endswith("torch: False")


def test_tables_are_aligned() -> None:
    assert table([("name", "size"), ("a", "1.0 MiB"), ("longer", "-")]).splitlines() == [
        "name       size",
        "a       1.0 MiB",
        "longer        -",
    ]
