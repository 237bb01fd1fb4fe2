"""A model's shape, read from its `config.json` alone: no torch, no transformers.

Hugging Face configs name the same thing differently (`n_layer`, `num_hidden_layers`).  They are
normalised here, once, so that plans and configuration checks need not import anything heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from splitlearn_core.families import Family, family_of
from splitlearn_core.messages import short
from splitlearn_core.regular_files import read_json

CONFIG_FILE = "config.json"

# transformers makes lists, dicts and modules of as many items as a config names, before anything
# compares it with the checkpoint.  The deepest published models have some 200 layers, the widest
# 16,384 (small) experts.
MAX_LAYERS = 1024
_MAX_COUNT = 2**16
_COUNT = re.compile(r"(layers?|experts?|heads?|groups?|labels)$")


@dataclass(frozen=True)
class ModelShape:
    """What `config.json` says of a model's size.

    Attributes:
        model_type: Architecture, as transformers names it.
        num_layers: Number of decoder layers.
        hidden_size: Width of the hidden state.
        vocab_size: Number of token ids.
        max_positions: Longest sequence, or `None` where the config does not say.
        dtype: The `dtype` (older: `torch_dtype`) that the config names, or `None`.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    dtype: str | None


FindFamily = Callable[[str], Family]
"""Returns how a `model_type` is built, or raises `UnsupportedModelError`."""


def read_shape(folder: Path | str, find_family: FindFamily = family_of) -> ModelShape:
    """Read the shape of the model in `folder`.

    Args:
        folder: Holds `config.json`.
        find_family: Knows the names that the config has for its sizes.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) The folder or its `config.json` is not there.
        CheckpointError: (a `ValueError`) The file is no JSON object, lacks a field, holds one of
            the wrong type or beyond all measure, or asks for code of its own (`auto_map`, a
            kernel from a hub) or for quantised weights.
        UnsupportedModelError: (a `KeyError`) The architecture is not known.
    """
    path = Path(folder) / CONFIG_FILE
    return shape_of(read_config(path), str(path), find_family)


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`."""
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelSourceError(f"no model in {path.parent}: it has no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object, found {type(config).__name__}")
    return config


def shape_of(config: dict[str, Any], where: str, find_family: FindFamily = family_of) -> ModelShape:
    """Normalise a config that is already read; `where` names it in errors."""
    _refuse_code(config, where)
    _check_counts(config, where)
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where} is of quantised weights (quantization_config), which can't be split yet; use"
            " the model as it was before"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where} names no model_type, so its architecture is unknown")
    family = _family(model_type, where, find_family)
    dtype = config.get("dtype", config.get("torch_dtype"))
    text = config.get("text_config")
    decoder = text if isinstance(text, dict) and family.layer_count_key not in config else config
    return ModelShape(
        model_type=model_type,
        num_layers=_num_layers(decoder, family, where),
        hidden_size=_positive(decoder, (family.hidden_size_key, "hidden_size"), where),
        vocab_size=_positive(decoder, ("vocab_size",), where),
        max_positions=_find_positive(
            decoder, (family.max_positions_key, "max_position_embeddings"), where
        ),
        dtype=dtype if isinstance(dtype, str) else None,
    )


def _refuse_code(config: dict[str, Any], where: str) -> None:
    """Refuse a config that asks for code from elsewhere."""
    if "auto_map" in config:
        raise CheckpointError(
            f"{where} asks for code that comes with the model (auto_map); that code is never run,"
            " use an architecture that transformers has built in"
        )
    for key, value in _fields(config):
        if key.endswith("_implementation") and "/" in str(value):
            raise CheckpointError(
                f"{where} asks for code from a hub ({key}: {short(value)}); that code is never run,"
                " take the field out"
            )


def _check_counts(config: dict[str, Any], where: str) -> None:
    """Refuse numbers of things that no model has."""
    for key, value in _fields(config):
        if _COUNT.search(key) and isinstance(value, (int, float)) and value > _MAX_COUNT:
            raise CheckpointError(f"{where}: {key} is {short(value)}, the limit is {_MAX_COUNT}")


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config, and of those within it."""
    waiting = [config]
    while waiting:
        for key, value in waiting.pop().items():
            yield key, value
            if isinstance(value, dict):
                waiting.append(value)


def _family(model_type: str, where: str, find_family: FindFamily) -> Family:
    """Return how the architecture is built that a config names."""
    try:
        return find_family(model_type)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{where}: {error}") from error


def _num_layers(decoder: dict[str, Any], family: Family, where: str) -> int:
    """Return the number of layers, as many as a model may have."""
    listed = decoder.get(family.layer_count_key)
    if isinstance(listed, list) and listed:
        layers = len(listed)
    else:
        layers = _positive(decoder, (family.layer_count_key, "num_hidden_layers"), where)
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{where} names {layers} layers, the limit is {MAX_LAYERS}")
    return layers


def _find_positive(config: dict[str, Any], keys: tuple[str, ...], where: str) -> int | None:
    """Return the first of `keys` that the config has, checked to be a positive integer."""
    for key in keys:
        if key in config:
            value = config[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(
                    f"{where}: {key} must be a positive integer, found {short(value)}"
                )
            return value
    return None


def _positive(config: dict[str, Any], keys: tuple[str, ...], where: str) -> int:
    """As `_find_positive`, where one of the keys must be there."""
    value = _find_positive(config, keys, where)
    if value is None:
        raise CheckpointError(f"{where} lacks {' or '.join(keys)}")
    return value
