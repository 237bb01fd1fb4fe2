"""Safetensors headers and index files: names, dtypes, shapes and byte ranges, without a weight.

Format: https://github.com/huggingface/safetensors#format.  A file is 8 bytes (header length,
little-endian), a JSON header, and the tensors' bytes without holes.  Every figure of a header is
checked against the file's real length before anything is mapped or allocated by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from splitlearn_core.collector import collector_paused
from splitlearn_core.errors import CheckpointError
from splitlearn_core.messages import short
from splitlearn_core.regular_files import open_regular, parse_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The format allows 100 MB; parsing that much JSON is itself a burden.  The largest published
# checkpoints (100,000 tensors) need about 12 MB.
MAX_HEADER_BYTES = 32 * 1024 * 1024
LENGTH_BYTES = 8

# Beyond these no tensor can be; figures without bound would make their product take for ever.
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1
_MAX_NAME = 1000
_MAX_FILE_NAME = 255

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """One stored tensor.  There may be a hundred thousand: a tuple is made fastest.

    Attributes:
        dtype: As the format names it: `F32`, `BF16`, `I64`, …
        shape: Sizes of its dimensions.
        start: First byte, counted from the beginning of the file.
        end: One past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors that a safetensors file holds, in the order of their bytes.

    Raises:
        CheckpointError: The file is not there, not a regular file, cut off, or its header lies;
            says which tensor.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = _header_bytes(file, size, path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    return parse_header(header_bytes, size, str(path))


def parse_header(header: bytes, file_size: int, where: str) -> dict[str, TensorInfo]:
    """Check and parse the JSON part of a file of `file_size` bytes; `where` names it in errors."""
    with collector_paused:
        return _parse_header(header, file_size, where)


def _parse_header(header: bytes, file_size: int, where: str) -> dict[str, TensorInfo]:
    entries = parse_json(header, f"{where}: the header", unique_keys=True)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{where}: the header must be an object")
    entries.pop("__metadata__", None)
    base = LENGTH_BYTES + len(header)
    infos = {name: _tensor_info(name, entry, base, where) for name, entry in entries.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_coverage(ordered, base, file_size, where)
    return ordered


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Return the length of the JSON part, from the first bytes of a file of `file_size` bytes.

    Raises:
        CheckpointError: The file is too short, or the header longer than is allowed.
    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{where} is cut off: {file_size} bytes are no safetensors file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: the header is said to have {length} bytes, the limit is {MAX_HEADER_BYTES};"
            " this is no safetensors file, or a damaged one"
        )
    if LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            f"{where} is cut off: its header alone has {length} bytes, the file {file_size}"
        )
    return length


def read_index(path: Path) -> dict[str, str]:
    """Read the `weight_map` (tensor name to file name) of a sharded checkpoint's index file.

    Raises:
        CheckpointError: It is no JSON, has no usable `weight_map`, names a tensor twice, or a
            file outside of its own folder.
    """
    try:
        index = read_json(path, unique_keys=True)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map (tensor name to file name)")
    sound: set[str] = set()  # a hundred thousand tensors lie in a few files
    for name, file in weight_map.items():
        check_name(name, str(path))
        if isinstance(file, str) and file in sound:
            continue
        if not is_file_name(file):
            raise CheckpointError(f"{path}: {name} is said to lie in {short(file)}, no file name")
        sound.add(file)
    return weight_map


def is_file_name(name: object) -> bool:
    """Whether `name` is that of a file in the same folder."""
    return (
        isinstance(name, str)
        and name not in {"", ".", ".."}
        and Path(name).name == name
        and name.isprintable()
        and len(os.fsencode(name)) <= _MAX_FILE_NAME
    )


def check_name(name: str, where: str) -> None:
    """Refuse what can't be the name of a tensor, and what no message could show."""
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= _MAX_NAME):
        raise CheckpointError(f"{where}: {short(name)} is no name for a tensor")


def _header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    """Read the JSON part, its length checked first."""
    return file.read(header_length(file.read(LENGTH_BYTES), size, str(path)))


def _tensor_info(name: str, entry: Any, base: int, where: str) -> TensorInfo:
    """Check one entry of a header by itself."""
    check_name(name, where)
    if not isinstance(entry, dict):
        found = short(entry)
        raise CheckpointError(f"{where}: the entry of {name} must be an object, found {found}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: {name} has the unknown dtype {short(dtype)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: {name} has no usable shape: {short(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004
        raise CheckpointError(f"{where}: {name} has no usable data_offsets: {short(offsets)}")
    info = TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])
    expected = info.numel * DTYPE_BYTES[dtype]
    if expected != info.nbytes:
        raise CheckpointError(
            f"{where}: {name} {dtype}{list(shape)} needs {expected} bytes, its offsets give"
            f" {info.nbytes}"
        )
    return info


def _is_sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers, as a tensor's sizes can be."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    for size in value:  # noqa: SIM110 - a generator would take twice as long
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            return False
    return True


def _check_coverage(infos: dict[str, TensorInfo], base: int, file_size: int, where: str) -> None:
    """Check that the tensors follow each other without hole or overlap, up to the file's end."""
    position = base
    for name, info in infos.items():
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "follows a hole"
            raise CheckpointError(f"{where}: {name} {kind} (byte {info.start}, not {position})")
        position = info.end
    if position > file_size:
        names = [name for name, info in infos.items() if info.end > file_size]
        raise CheckpointError(
            f"{where} is cut off: it has {file_size} bytes, its header promises {position};"
            f" not (wholly) there: {listed(names)}"
        )
    if position < file_size:
        raise CheckpointError(f"{where} has {file_size - position} bytes after its last tensor")


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Join names for a message: sorted, and cut off with a count where there are many."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {more} more" if more > 0 else "")
