"""Weights files of torch's own formats (`.bin`, `.pt`, `.pth`): plain tensors by name, or refused.

Such a file is a pickle, and could otherwise run code.
"""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.headers import check_name, listed
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.regular_files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

_ZIP = b"PK\x03\x04"
# How torch names the function or class that a pickle asks for and does not get.
_ASKED_FOR = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) ([\w.]+)")

# What a training script writes beside the weights, of which one at least makes a file its own.
_WEIGHTS = "model"
_TRAINING = frozenset({"optimizer", "scaler", "scheduler", "epoch", "step", "world_size"})


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """Read a plain state dict, mapping its tensors where the file's format allows it.

    Of a file that a training script continues from (`model` beside `optimizer`, `step`, …) it is
    what `model` holds.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no such file.
        CheckpointError: (a `ValueError`) It holds anything but tensors by name, or is damaged.
    """
    loaded = load_torch_file(path)
    return plain_tensors(loaded[_WEIGHTS] if is_training_file(loaded) else loaded, path)


def is_training_file(loaded: Any) -> bool:
    """Whether a file holds weights and what is needed to go on training them."""
    return (
        isinstance(loaded, dict)
        and isinstance(loaded.get(_WEIGHTS), dict)
        and not _TRAINING.isdisjoint(loaded)
    )


def load_torch_file(path: Path) -> Any:
    """Read a file of plain values and tensors, mapping these where its format allows it.

    Nothing that a pickle could do besides is done (`weights_only`).

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no such file.
        CheckpointError: (a `ValueError`) It holds anything else, or is damaged.
    """
    try:
        with open_regular(path) as file:
            is_archive = _is_archive(file, path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise ModelSourceError(f"there is no file {path}") from error
    except Exception as error:
        # torch raises whatever its reader ran into, of many types; there is no second attempt
        raise CheckpointError(_refusal(path, str(error), in_one_line(error))) from error


def _refusal(path: Path, said: str, in_short: str) -> str:
    """Return what to tell of a file that torch did not read, without its advice to trust it."""
    if (asked := _ASKED_FOR.search(said)) is not None:
        return (
            f"{path} is not a plain state dict (tensors by name): it asks for {short(asked[1])},"
            " which was not run; save its state_dict() alone where it was made"
        )
    _, is_verdict, verdict = said.partition("WeightsUnpickler error:")
    reason = verdict.strip().partition("\n")[0] if is_verdict else in_short
    return (
        f"{path} is not a plain state dict (tensors by name), or is damaged; convert it to"
        f" safetensors where it was made.  torch says: {reason}"
    )


def _is_archive(file: BinaryIO, path: Path) -> bool:
    """Whether a file is of torch's present format, which alone can be mapped.

    torch writes such an archive without compression; one that has any can't be mapped, and might
    unpack to anything.
    """
    start = file.read(len(_ZIP))
    if not start:
        raise CheckpointError(f"{path} is empty: it has 0 bytes")
    if start != _ZIP:
        return False
    try:
        packed = [i.filename for i in zipfile.ZipFile(file).infolist() if i.compress_type]
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: the table at its end, of what is in it, can't be read"
            f" ({in_one_line(error)}); copy it again from where it was made"
        ) from error
    if packed:
        raise CheckpointError(f"{path} is compressed, which torch.save does not do; save it again")
    return True


def plain_tensors(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """Check that a file held tensors by name, and none but ordinary ones."""
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not tensors by name")
    for name in loaded:
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds something by the name {short(name)}, no text")
        check_name(name, str(path))
    strangers = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise CheckpointError(f"{path} holds more than tensors: {listed(strangers)}")
    unusual = [name for name, tensor in loaded.items() if not _is_ordinary(tensor)]
    if unusual:
        raise CheckpointError(
            f"{path} holds tensors without plain values (sparse, quantised or empty shells):"
            f" {listed(unusual)}"
        )
    return dict(loaded)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor simply has a value for each element."""
    return (
        type(tensor) in {torch.Tensor, nn.Parameter}
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
    )
