"""Write a safetensors file tensor by tensor, hashing it on the way.

`safetensors.torch.save_file` wants every tensor at once.  Here each is asked for when its turn
comes, so that neither a cast nor a fetch needs room for more than one.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from splitlearn_core.dtypes import BY_STORED_NAME

_STORED_NAMES = {dtype: name for name, dtype in BY_STORED_NAME.items()}

# Tensors whose sizes are multiples of a cache line then begin on one; the format only asks for 8.
_ALIGNMENT = 64
# So much is cast and written at a time.
_CHUNK_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape that a tensor is to have in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it will take."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """What was written: length in bytes, and SHA-256 (hexadecimal), if it was asked for."""

    nbytes: int
    sha256: str


def in_file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names of tensors in the order in which `write_tensors` asks for them."""
    # the widest elements first: each tensor then begins at a multiple of its own element's size
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    hashed: bool = True,
) -> WrittenFile:
    """Write the tensors named in `specs` to a new file.

    Peak memory: what `read` takes for one tensor, and 4 Mi elements beside it.

    Args:
        path: The file; it must not be there.
        specs: Tensor name -> dtype and shape in the file.
        read: Returns a tensor by name, of that shape; it is cast to the dtype here.
        metadata: Goes into the header, beside `format: pt`.
        hashed: Whether to make the SHA-256; otherwise it is empty.

    Raises:
        ValueError: `read` returned a tensor of another shape.
        OSError: The file can't be written; what there is of it stays.
    """
    ordered = [(name, specs[name]) for name in in_file_order(specs)]
    digest = hashlib.sha256()
    hash_more = digest.update if hashed else _ignore
    with path.open("xb") as file:
        _put(file, hash_more, header_of(ordered, metadata or {}))
        for name, spec in ordered:
            tensor = read(name)
            if tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, not {list(spec.shape)}")
            for start in range(0, tensor.numel(), _CHUNK_ELEMENTS):
                chunk = tensor.reshape(-1)[start : start + _CHUNK_ELEMENTS]
                _put(file, hash_more, raw_bytes(chunk.to("cpu", spec.dtype)))
        return WrittenFile(file.tell(), digest.hexdigest() if hashed else "")


def header_of(ordered: list[tuple[str, TensorSpec]], metadata: Mapping[str, str]) -> bytes:
    """Return length and JSON of the header, padded with spaces as the format allows."""
    entries: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    position = 0
    for name, spec in ordered:
        entries[name] = {
            "dtype": _STORED_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = text + b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded


def raw_bytes(chunk: torch.Tensor) -> memoryview:
    """Return the bytes of a flat tensor, without a copy."""
    return chunk.detach().contiguous().view(torch.uint8).numpy().data


def _put(
    file: BinaryIO, hash_more: Callable[[bytes | memoryview], None], data: bytes | memoryview
) -> None:
    """Write and hash."""
    file.write(data)
    hash_more(data)


def _ignore(data: bytes | memoryview) -> None:
    """Hash nothing."""
