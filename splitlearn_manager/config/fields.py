"""Types of single values, and what they are checked for."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from splitlearn_core.plan import check_split_points
from splitlearn_manager.config.units import parse_bytes

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
DTYPES = ("float32", "float16", "bfloat16", "float64")

_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?", re.ASCII)
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def check_model_id(value: str) -> str:
    """Return a model id, which is safe as a part of a URL, a path and a metric's label.

    Raises:
        ValueError: It is not of the allowed form.
    """
    if not isinstance(value, str) or not MODEL_ID.fullmatch(value) or ".." in value:
        raise ValueError(
            "must be 1 to 128 letters, digits, '.', '_' or '-', begin with a letter or digit,"
            " and have no '..'"
        )
    return value


def _path(value: Any) -> Any:
    """Return a path object as text, and leave the rest to the type check."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _text(value: Any) -> Any:
    """Refuse an empty text, which no field means."""
    if value == "":
        raise ValueError("must not be empty")
    return value


def _device(value: Any) -> Any:
    """Return the name of a device (`torch.device` has one as its `str`)."""
    name = str(value)
    if not _DEVICE.fullmatch(name):
        raise ValueError("must be cpu, cuda, cuda:0, cuda:1, … or mps")
    return name


def _dtype(value: Any) -> Any:
    """Return the plain name of a dtype; torch is not imported to know one."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"must be one of {', '.join(DTYPES)}")
    return name


def _split_points(value: Any) -> Any:
    """Return layer numbers as a tuple, in rising order."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of layer numbers, as in [8, 24]")  # noqa: TRY004
    return check_split_points(value)


def _seconds(value: float) -> float:
    """Refuse what is no length of time."""
    if not math.isfinite(value) or value < 0:
        raise ValueError("must be a number of seconds, 0 or more")
    return value


def _log_level(value: Any) -> Any:
    """Return a log level's name in small letters."""
    name = value.lower() if isinstance(value, str) else value
    if name not in _LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(_LOG_LEVELS)}")
    return name


def _plain(value: Any) -> Any:
    """Return a copy of nested mappings and lists, as YAML would have given them.

    A copy, so that changing what was passed in does not change a configuration that is in use.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _path(value)


def _mapping(value: Any) -> Any:
    """Return a copy of a mapping; a key with nothing below it (`config:`) is an empty one."""
    return {} if value is None else _plain(value)


ModelId = Annotated[str, BeforeValidator(check_model_id)]
Text = Annotated[str, BeforeValidator(_text)]
PathText = Annotated[str, BeforeValidator(_text), BeforeValidator(_path)]
Device = Annotated[str, BeforeValidator(_device)]
DType = Annotated[str | None, BeforeValidator(_dtype)]
SplitPoints = Annotated[tuple[int, ...], BeforeValidator(_split_points)]
Seconds = Annotated[float, AfterValidator(_seconds)]
ByteCount = Annotated[int, BeforeValidator(parse_bytes)]
LogLevel = Annotated[str, BeforeValidator(_log_level)]
PlainMapping = Annotated[dict[str, Any], BeforeValidator(_mapping)]
