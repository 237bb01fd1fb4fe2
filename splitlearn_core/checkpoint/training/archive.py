"""One checkpoint as files: written by one process, and read with every byte checked.

training.json           step, epoch, … and what every other file is of
NAME.json               the state of one thing, see `encoding`; NAME.safetensors its tensors
rank-00000.json         random states and values of a rank, likewise with tensors beside it
manifest.json           length and hashes of all the others
"""

from __future__ import annotations

import errno
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors

from splitlearn_core.checkpoint.files import folders
from splitlearn_core.checkpoint.files.folders import Checkpoint, Unfinished
from splitlearn_core.checkpoint.files.hashed_files import (
    Output,
    check_file,
    hash_file,
    read_bytes,
    read_tensor_file,
    write_bytes,
    write_tensor_file,
)
from splitlearn_core.checkpoint.files.manifest import (
    INSTEAD,
    MANIFEST_FILE,
    FileRecord,
    read_manifest,
    to_text,
)
from splitlearn_core.checkpoint.training.encoding import Encoded, decode
from splitlearn_core.errors import CheckpointError, StorageError
from splitlearn_core.messages import in_one_line
from splitlearn_core.regular_files import parse_json

TRAINING = "training"
RESERVED = frozenset({TRAINING, "manifest"})
"""Names that nothing that is saved can have."""

_LIBRARIES = ("splitlearn", "torch", "numpy", "transformers", "safetensors", "peft")
_LENGTH_BYTES = 8
# Room that must be free beside the tensors, for everything else.
_SPARE_BYTES = 1024 * 1024


@dataclass
class Content:
    """What is to be written.

    Attributes:
        step: Of training, for the name.
        training: The text of `training.json`, as a tree.
        parts: State of each thing, by name.
        ranks: Of each rank, as `pack` made it.
    """

    step: int
    training: dict[str, Any]
    parts: dict[str, Encoded]
    ranks: list[bytes] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, and of what ranks gave."""
        tensors = (t for part in self.parts.values() for t in part.tensors.values())
        return sum(t.nbytes for t in tensors) + sum(map(len, self.ranks))


def versions() -> dict[str, str]:
    """Return the versions of what a checkpoint depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def pack(part: Encoded) -> bytes:
    """Return a small state as bytes, to be sent to the rank that writes."""
    tree = json.dumps(part.tree).encode()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in part.tensors.items()}
    return len(tree).to_bytes(_LENGTH_BYTES, "little") + tree + safetensors.save(tensors)


def unpack(packed: bytes) -> tuple[bytes, bytes]:
    """Return the JSON and the safetensors file that `pack` put together."""
    end = _LENGTH_BYTES + int.from_bytes(packed[:_LENGTH_BYTES], "little")
    return packed[_LENGTH_BYTES:end], packed[end:]


# --- Writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Writes checkpoints into one folder.

    Attributes:
        folder: Theirs.
        keep_last: How many stay; `None` keeps all.
        output: How.
    """

    folder: Path
    keep_last: int | None
    output: Output

    def write(self, content: Content) -> Checkpoint:
        """Write a checkpoint; when this returns it is on the disk, and old ones are gone.

        Raises:
            StorageError: (an `OSError`) The disk is full or fails; the checkpoints that were there
                are as they were.
        """
        with self.begun() as unfinished:
            return self.finish(unfinished, content)

    @contextmanager
    def begun(self) -> Iterator[Unfinished]:
        """Lend a hidden folder, to be finished within the block, and delete it otherwise.

        Raises:
            StorageError: (an `OSError`) See `write`.
        """
        with self._storing("the checkpoints that were there are as they were.  Make room"):
            unfinished = folders.begin(self.output.disk, self.folder)
            try:
                yield unfinished
            except BaseException:
                unfinished.discard()
                raise

    def finish(self, unfinished: Unfinished, content: Content) -> Checkpoint:
        """Write all that is not there yet, and publish; see `write`."""
        self._check_room(content.nbytes)
        records = dict(self._found(unfinished.path)) | dict(
            self._write_files(unfinished.path, content)
        )
        self._write_manifest(unfinished.path, records)
        checkpoint = unfinished.publish(content.step)
        self.output.disk.sync_folder(self.folder)
        with self._storing(f"{checkpoint.path.name} is saved, and older ones are still there"):
            if self.keep_last is not None:
                folders.keep_newest(self.output.disk, self.folder, self.keep_last)
        return checkpoint

    def _found(self, folder: Path) -> Iterator[tuple[str, FileRecord]]:
        """Yield the files that ranks have written into a folder of it."""
        for path in sorted(folder.glob("*/*")):
            name = path.relative_to(folder).as_posix()
            yield name, hash_file(self.output, path)

    def _write_files(self, folder: Path, content: Content) -> Iterator[tuple[str, FileRecord]]:
        """Write all but the manifest; yield each file with what is in it."""
        for name, part in content.parts.items():
            yield from self._write_part(folder, name, part)
        for rank, packed in enumerate(content.ranks):
            name = rank_name(rank)
            for suffix, data in zip((".json", ".safetensors"), unpack(packed), strict=True):
                yield name + suffix, self._write_bytes(folder / (name + suffix), data)
        training = json.dumps(content.training, indent=1).encode()
        yield f"{TRAINING}.json", self._write_bytes(folder / f"{TRAINING}.json", training)

    def _write_part(
        self, folder: Path, name: str, part: Encoded
    ) -> Iterator[tuple[str, FileRecord]]:
        tree = json.dumps(part.tree).encode()
        yield f"{name}.json", self._write_bytes(folder / f"{name}.json", tree)
        if part.tensors:
            path = folder / f"{name}.safetensors"
            yield path.name, write_tensor_file(self.output, path, part.tensors)

    def _write_manifest(self, folder: Path, records: Mapping[str, FileRecord]) -> None:
        self._write_bytes(folder / MANIFEST_FILE, to_text(records, versions()).encode())

    def _write_bytes(self, path: Path, content: bytes) -> FileRecord:
        return write_bytes(self.output, path, content)

    def _check_room(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < nbytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"{free} bytes are free, and the checkpoint has {nbytes}")

    @contextmanager
    def _storing(self, state: str) -> Iterator[None]:
        """Say where it was, what is left, and what to do."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"{self.folder}: the checkpoint can't be saved: {in_one_line(error)}; {state}, or"
                " name another folder",
                error.errno,
            ) from error


def rank_name(rank: int) -> str:
    """Return what the files of a rank are called."""
    return f"rank-{rank:05}"


# --- Reading -----------------------------------------------------------------------------------


class Archive:
    """A checkpoint that is read: each file is compared with the manifest before it is believed."""

    def __init__(self, path: Path, reading: Executor) -> None:
        """Read what the checkpoint is of.

        Raises:
            CheckpointError: (a `ValueError`) It is damaged, or another release's; names the file.
        """
        self.path = path
        self._reading = reading
        self._records = read_manifest(path)
        self.training: dict[str, Any] = self._json(f"{TRAINING}.json")

    def part(self, name: str) -> Any:
        """Return the state of one thing; tensors are on the CPU, in memory of their own."""
        tree = self._json(f"{name}.json")
        file = f"{name}.safetensors"
        tensors: Mapping[str, torch.Tensor] = {}
        if file in self._records:
            tensors = read_tensor_file(self.path / file, self._records[file], self._reading)
        return decode(tree, tensors, str(self.path / f"{name}.json"))

    def check(self, folder: str, share: slice) -> None:
        """Read the files in a folder of the checkpoint through, or a share, and compare them."""
        names = sorted(name for name in self._records if name.startswith(f"{folder}/"))
        for name in names[share]:
            check_file(self.path / name, self._records[name], self._reading)

    def _json(self, name: str) -> Any:
        path = self.path / name
        if name not in self._records:
            raise CheckpointError(f"{self.path / MANIFEST_FILE} does not have {name}; {INSTEAD}")
        return parse_json(read_bytes(path, self._records[name], self._reading), str(path))


@contextmanager
def opened(path: Path, threads: int) -> Iterator[Archive]:
    """Read a checkpoint with so many threads, and keep it from being deleted meanwhile."""
    with folders.reading(path), ThreadPoolExecutor(threads, "splitlearn-read") as reading:
        yield Archive(path, reading)
