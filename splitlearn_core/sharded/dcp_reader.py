"""Reading DCP folders that nobody vouches for.

torch reads `.metadata`, which is a pickle, with whatever that pickle asks for, and values that are
no tensors likewise.  Here metadata may ask for the few classes of which such a file is made, and
values for none.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.headers import is_file_name
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.regular_files import open_regular, refuse_unless_regular

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import ReadItem

METADATA_FILE = ".metadata"

# No published checkpoint's is anywhere near: 100,000 tensors on 64 ranks take some 100 MB.
_MAX_METADATA_BYTES = 2**30

# Of what DCP makes its `.metadata`, by module.
_ALLOWED: Mapping[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"PosixPath", "WindowsPath", "Path"}),
    "pathlib._local": frozenset({"PosixPath", "WindowsPath", "Path"}),
}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the plain values of which DCP's metadata are."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that metadata are made of; refuse any other."""
        known = name in _ALLOWED.get(module, ())
        if not known and not (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no metadata need")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """torch's reader of DCP folders, which runs nothing that a file asks for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read what the folder holds, without a value.

        Raises:
            ModelSourceError: (a `FileNotFoundError`) There is no metadata file.
            CheckpointError: (a `ValueError`) It is damaged, or no metadata.
        """
        path = self._folder / METADATA_FILE
        try:
            content = _bounded(path)
            metadata = _Unpickler(io.BytesIO(content)).load()
        except FileNotFoundError as error:
            raise ModelSourceError(
                f"no DCP checkpoint in {self._folder}: it has no {METADATA_FILE} (saving may not"
                " have ended)"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
        except Exception as error:
            # a damaged pickle fails in whatever its bytes happen to say
            raise CheckpointError(f"{path} is damaged: {in_one_line(error)}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise CheckpointError(f"{path} holds no metadata of DCP")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        _check_files(metadata, self._folder)
        return metadata


class PlainPlanner(DefaultLoadPlanner):
    """torch's planner, but for values that are no tensors: plain ones alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place; torch would unpickle any."""
        plain = torch.load(value, weights_only=True)
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


@dataclass(frozen=True)
class StoredInPieces:
    """What a DCP checkpoint says of one tensor.

    Attributes:
        name: As it is stored.
        dtype: As torch names it: `float16`, …
        shape: Of the whole.
        nbytes: Bytes of the whole.
        files: Those that have pieces of it, sorted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    files: tuple[str, ...]


def stored_tensors(folder: Path) -> list[StoredInPieces]:
    """Return what tensors a DCP folder has, from its metadata alone, sorted by name.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no metadata file.
        CheckpointError: (a `ValueError`) It is damaged, or names files that are not (wholly) there.
    """
    metadata = PlainReader(folder).read_metadata()
    files: dict[str, set[str]] = {}
    for index, place in (metadata.storage_data or {}).items():
        files.setdefault(index.fqn, set()).add(str(place.relative_path))
    return [
        StoredInPieces(
            name,
            dtype_name(stored.properties.dtype),
            tuple(stored.size),
            stored.size.numel() * stored.properties.dtype.itemsize,
            tuple(sorted(files.get(name, ()))),
        )
        for name, stored in sorted(metadata.state_dict_metadata.items())
        if isinstance(stored, TensorStorageMetadata)
    ]


def _bounded(path: Path) -> bytes:
    """Read a file, unless it is absurdly large."""
    with open_regular(path) as file:
        content = file.read(_MAX_METADATA_BYTES + 1)
    if len(content) > _MAX_METADATA_BYTES:
        raise CheckpointError(f"{path} is too large: the limit is {_MAX_METADATA_BYTES:,} bytes")
    return content


def _check_files(metadata: Metadata, folder: Path) -> None:
    """Refuse metadata that name files elsewhere, or such as are too short for what they hold."""
    ends: dict[str, int] = {}
    for place in (metadata.storage_data or {}).values():
        name = str(place.relative_path)
        ends[name] = max(ends.get(name, 0), place.offset + place.length)
    for name, end in ends.items():
        if not is_file_name(name):
            raise CheckpointError(f"{folder / METADATA_FILE} names {short(name)}, no file name")
        path = folder / name
        refuse_unless_regular(path)
        if not path.exists():
            raise CheckpointError(f"{path} is not there; {METADATA_FILE} says it is")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path} is cut off: it has {path.stat().st_size} bytes, {METADATA_FILE} promises"
                f" {end}"
            )
