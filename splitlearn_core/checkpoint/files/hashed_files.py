"""Files that are hashed while they are written, and checked while they are read.

Hashing takes longer than a fast disk does, so blocks are hashed in other threads, and the system is
told to begin bringing to the disk what was written: hashing, writing and the disk work at once.
Nothing is copied: tensors in the CPU's memory are written and hashed where they lie.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from splitlearn_core.checkpoint.files.disk import Disk, begin_writeback
from splitlearn_core.checkpoint.files.manifest import FileRecord, advising
from splitlearn_core.dtypes import BY_STORED_NAME
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import LENGTH_BYTES, TensorInfo, header_length, listed, parse_header
from splitlearn_core.regular_files import open_regular
from splitlearn_core.tensor_writer import TensorSpec, header_of, in_file_order, raw_bytes

BLOCK_BYTES = 8 * 1024 * 1024
"""What is hashed at a time."""

# Blocks that wait to be hashed; of tensors that had to be copied they hold memory.
_MOST_WAITING = 4
_CHUNK_BYTES = BLOCK_BYTES


# --- Writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """How files are written.

    Attributes:
        disk: The file system.
        hashing: Threads that hash.
        progress: Called now and then while something is written.
    """

    disk: Disk
    hashing: Executor
    progress: Callable[[], None] = lambda: None


class HashedFile:
    """A new file that is written from its beginning to its end."""

    def __init__(self, output: Output, path: Path) -> None:
        disk = output.disk
        self._disk = disk
        self._hashing = output.hashing
        self._progress = output.progress
        self._file = disk.create(path)
        self._position = 0
        self._block: list[memoryview] = []
        self._room = BLOCK_BYTES
        self._waiting: deque[Future[str]] = deque()
        self._hashes: list[str] = []

    def write(self, data: memoryview) -> None:
        """Append bytes, which must stay as they are until the file is finished."""
        while len(data):
            piece = data[: self._room]
            self._put(piece)
            self._block.append(piece)
            self._room -= len(piece)
            if not self._room:
                self._end_block()
            data = data[len(piece) :]

    def finish(self) -> FileRecord:
        """Bring the file to the disk, and return what is in it."""
        if self._block:
            self._end_block()
        self._disk.sync_file(self._file)
        self._progress()
        while self._waiting:
            self._hashes.append(self._waiting.popleft().result())
        return FileRecord(self._position, BLOCK_BYTES, tuple(self._hashes))

    def close(self) -> None:
        """Close the file, finished or not; no thread looks at what was written any more."""
        self._disk.close(self._file)
        for future in self._waiting:
            if not future.cancel():
                future.result()

    def _put(self, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            done += self._disk.write(self._file, piece[done:])
            self._progress()
        self._position += done

    def _end_block(self) -> None:
        """Let the block be hashed, and brought to the disk."""
        if len(self._waiting) >= _MOST_WAITING:
            self._hashes.append(self._waiting.popleft().result())
        self._waiting.append(self._hashing.submit(_sha256, self._block))
        length = BLOCK_BYTES - self._room
        begin_writeback(self._file, self._position - length, length)
        self._block, self._room = [], BLOCK_BYTES


def write_bytes(output: Output, path: Path, content: bytes) -> FileRecord:
    """Write a new file, and bring it to the disk."""
    with closing(HashedFile(output, path)) as file:
        file.write(memoryview(content))
        return file.finish()


def write_tensor_file(
    output: Output, path: Path, tensors: Mapping[str, torch.Tensor]
) -> FileRecord:
    """Write a new safetensors file, and bring it to the disk.

    Peak memory beside the tensors: of those on an accelerator, and of those that are not
    contiguous, one at a time, and some blocks.
    """
    specs = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    ordered = [(name, specs[name]) for name in in_file_order(specs)]
    with closing(HashedFile(output, path)) as file:
        file.write(memoryview(header_of(ordered, {})))
        for name, _ in ordered:
            for chunk in _chunks(tensors[name]):
                file.write(chunk)
        return file.finish()


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes; from an accelerator they come piece by piece."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.device.type == "cpu":
        yield raw_bytes(flat)
        return
    step = _CHUNK_BYTES // flat.itemsize
    for start in range(0, flat.numel(), step):
        yield raw_bytes(flat[start : start + step].cpu())


def _sha256(pieces: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def hash_file(output: Output, path: Path) -> FileRecord:
    """Return what is in a file that somebody else has written, and brought to the disk."""
    size = path.stat().st_size
    hashes = []
    for found in output.hashing.map(lambda s: _hash_at(path, s), range(0, size, BLOCK_BYTES)):
        hashes.append(found)
        output.progress()
    return FileRecord(size, BLOCK_BYTES, tuple(hashes))


def _hash_at(path: Path, start: int) -> str:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        room = memoryview(bytearray(BLOCK_BYTES))
        count = 0
        while count < BLOCK_BYTES and (more := file.readinto(room[count:])):
            count += more
        return _sha256([room[:count]])


# --- Reading -----------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """Where bytes of a file go: from `start` on, into `room`; they are of the tensor `name`."""

    start: int
    room: memoryview
    name: str


def read_bytes(path: Path, record: FileRecord, hashing: Executor) -> bytes:
    """Read a file that was written as `record` says.

    Raises:
        CheckpointError: (a `ValueError`) It is not there, or something else.
    """
    content = bytearray(_checked_size(path, record))
    _fill(path, record, [_Segment(0, memoryview(content), "")], hashing)
    return bytes(content)


def read_tensor_file(path: Path, record: FileRecord, hashing: Executor) -> dict[str, torch.Tensor]:
    """Read a safetensors file that was written as `record` says, in one pass.

    Returns:
        Tensors of their own memory, on the CPU.

    Raises:
        CheckpointError: (a `ValueError`) It is not there, or something else; says which tensors
            are damaged.
    """
    size = _checked_size(path, record)
    header, prefix = _read_header(path, size)
    tensors: dict[str, torch.Tensor] = {}
    segments = [_Segment(0, memoryview(prefix), "the header")]
    for name, info in header.items():
        tensor = torch.empty(info.shape, dtype=BY_STORED_NAME[info.dtype])
        tensors[name] = tensor
        if info.nbytes:
            segments.append(_Segment(info.start, raw_bytes(tensor.view(-1)), name))
    _fill(path, record, segments, hashing)
    return tensors


def check_file(path: Path, record: FileRecord, hashing: Executor) -> None:
    """Read a file through, and compare it with `record`.

    Raises:
        CheckpointError: (a `ValueError`) It is not there, or something else.
    """
    _checked_size(path, record)
    for _ in hashing.map(lambda n: _check_block(path, record, n, []), range(len(record.sha256))):
        pass


def _checked_size(path: Path, record: FileRecord) -> int:
    with advising(path):
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size} bytes, {record.bytes} were written")
    return size


def _read_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], bytearray]:
    """Return the tensors that the file says it holds, and room for the bytes that say so."""
    with advising(path), open_regular(path) as file:
        length = header_length(file.read(LENGTH_BYTES), size, str(path))
        header = parse_header(file.read(length), size, str(path))
    return header, bytearray(LENGTH_BYTES + length)


def _fill(path: Path, record: FileRecord, segments: list[_Segment], hashing: Executor) -> None:
    """Read the segments, which follow one another, and check every block."""
    blocks: list[list[_Segment]] = [[] for _ in record.sha256]
    for segment in segments:
        done = 0
        while done < len(segment.room):
            start = segment.start + done
            number = start // record.block_bytes
            length = min((number + 1) * record.block_bytes - start, len(segment.room) - done)
            piece = segment.room[done : done + length]
            blocks[number].append(_Segment(start, piece, segment.name))
            done += length
    jobs = [hashing.submit(_check_block, path, record, n, block) for n, block in enumerate(blocks)]
    try:
        for job in jobs:
            job.result()
    finally:
        for job in jobs:
            if not job.cancel():
                job.exception()


def _check_block(path: Path, record: FileRecord, number: int, into: list[_Segment]) -> None:
    """Read one block, and compare its hash."""
    start = number * record.block_bytes
    end = min(start + record.block_bytes, record.bytes)
    rooms = [segment.room for segment in into] or [memoryview(bytearray(end - start))]
    with advising(path):
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            for room in rooms:
                _read_fully(file.fileno(), room, path)
        if _sha256(rooms) != record.sha256[number]:
            names = listed({segment.name for segment in into} - {""}, 5)
            raise CheckpointError(
                f"{path} is damaged between bytes {start} and {end}"
                + (f" (of {names})" if names else "")
                + ": its SHA-256 is not what was written"
            )


def _read_fully(file: int, room: memoryview, path: Path) -> None:
    while len(room):
        count = os.readv(file, [room])
        if not count:
            raise CheckpointError(f"{path} became shorter while it was read")
        room = room[count:]
