"""The options that commands about models have in common, and what can be checked of them at once.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from splitlearn_core.checkpoint.minimind import MINIMIND, check_options, may_be_minimind
from splitlearn_core.families import family_of
from splitlearn_core.loading.files import (
    BUILTIN_PREFIX,
    FolderFiles,
    config_type_of,
    find_files,
    local_config,
)
from splitlearn_core.plan import SplitPlan, check_split_points
from splitlearn_core.shape import read_shape

AUTO = "auto"
SPLIT_POINTS = "--split-points"
SPLIT = "--split"
_NUMBERS = re.compile(r"\d+(,\d+)*,?")


class SplitPointsCommand(TyperCommand):
    """A command whose `--split-points` takes several values: `8 24`, or `8,24`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give each value an option of its own, as the parser wants it."""
        return super().parse_args(ctx, spread(args))


def spread(arguments: Iterable[str]) -> list[str]:
    """Return `--split-points 8 --split-points 24` for `--split-points 8 24`; `--split` likewise."""
    result: list[str] = []
    option: str | None = None
    for argument in arguments:
        if option and _NUMBERS.fullmatch(argument):
            result += [argument] if result[-1] == option else [option, argument]
        else:
            name = argument.partition("=")[0]
            option = name if name in {SPLIT_POINTS, SPLIT} else None
            result.append(argument)
    return result


def parse_points(values: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers in `["8", "24"]` or `["8,24"]`.

    Raises:
        ValueError: They are no layer numbers in rising order.
    """
    texts = [text.strip() for value in values for text in value.split(",") if text.strip()]
    if not all(text.isdecimal() for text in texts):
        raise ValueError(f"{SPLIT_POINTS} takes layer numbers, as in 8 24; found {' '.join(texts)}")
    return check_split_points(map(int, texts))


def check_dtype(dtype: str | None) -> str | None:
    """Return the plain name of a dtype that weights can have.

    Raises:
        ValueError: They can't; lists those that they can.
    """
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415 - slow

    from splitlearn_manager.config.fields import DType as ConfiguredDType  # noqa: PLC0415

    try:
        name: str | None = TypeAdapter(ConfiguredDType).validate_python(dtype)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"--dtype {message}, found {dtype!r}") from error
    return name


def check_model(
    model: str,
    points: Iterable[int] | None,
    *,
    model_type: str,
    allow_empty: bool,
    allow_uncertified: bool,
    minimind: Mapping[str, Any] | None = None,
) -> None:
    """Check what `config.json` alone tells, before torch is imported.

    Where uncertified architectures are let in, nothing is checked here: what such a config means
    is found out with torch.

    Raises:
        SplitLearnError: There is no such model, or it is not of a kind that can be split.
        ValueError: It has not so many layers, or is of another `model_type`.
    """
    if allow_uncertified:
        return
    if model_type not in {AUTO, MINIMIND}:
        family_of(model_type)
    if not (model.startswith(BUILTIN_PREFIX) or Path(model).expanduser().exists()):
        return  # on the hub, or nowhere: asking takes long, and needs more imports
    files = find_files(model)
    if not isinstance(files, FolderFiles):
        return
    if may_be_minimind(files.weights_file, config_type_of(files), model_type, minimind):
        return  # what such a file is, its tensors tell
    shape = read_shape(local_config(files))
    if model_type not in {AUTO, shape.model_type}:
        raise ValueError(f"{model} is a {shape.model_type} model, not {model_type}")
    if points is not None:
        SplitPlan.from_split_points(shape.num_layers, points, allow_empty=allow_empty)


def parse_minimind(texts: Iterable[str] | None) -> dict[str, Any] | None:
    """Return what `--minimind num_attention_heads=16` says; `None` where nothing does.

    Raises:
        ValueError: It is no NAME=VALUE, or no option that a MiniMind file has.
    """
    if not texts:
        return None
    return check_options(dict(_assignment(text) for text in texts))


def _assignment(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`, the value as JSON has it, or as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--minimind takes NAME=VALUE, as in num_attention_heads=16; found {text}")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a name on the hub, builtin:NAME, or a MiniMind file."
    ),
]
OptionalModelName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A folder, a name on the hub, or builtin:NAME."),
]
_POINTS = typer.Option(
    SPLIT,
    SPLIT_POINTS,
    metavar="N N…",
    help="Layers where the cuts are: 8 24, or 8,24 (of 28 layers).",
)
SplitPoints = Annotated[list[str], _POINTS]
OptionalSplitPoints = Annotated[list[str] | None, _POINTS]
DType = Annotated[
    str | None, typer.Option(help="Cast weights to this: float32, bfloat16, …; default: as stored.")
]
ServedDType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Compute in this: float32, bfloat16, …; default: as stored, or as the Trunk.",
    ),
]
ModelType = Annotated[
    str, typer.Option(help="The architecture, or minimind; auto: what the config says.")
]
MiniMind = Annotated[
    list[str] | None,
    typer.Option(
        "--minimind",
        metavar="NAME=VALUE",
        help="What a MiniMind file does not tell: num_attention_heads=16, rope_theta=1e4, …",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A LoRA adapter that is added into the weights of the parts that are here.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where files from the hub are kept.")]
AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty", help="Bottom or Top may have no layers.")
]
AllowUncertified = Annotated[
    bool,
    typer.Option(
        "--allow-uncertified",
        help="Let in an architecture that was not certified, as its forward shows it to be built.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
