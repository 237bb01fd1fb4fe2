"""Where tensors come from.

A source names the tensors that it has, tells dtype and shape of one without reading it, and reads
one at a time.  Which tensors are wanted, and under which name the model knows them, is no concern
of a source.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open

from splitlearn_core.dtypes import BY_STORED_NAME
from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE, read_header, read_index
from splitlearn_core.loading.pages import MappedPages
from splitlearn_core.loading.torch_files import read_torch_file
from splitlearn_core.messages import in_one_line

if TYPE_CHECKING:
    from pathlib import Path

    from splitlearn_core.headers import TensorInfo
    from splitlearn_core.loading.files import CheckpointFiles
    from splitlearn_core.loading.stages import Progress

logger = logging.getLogger(__name__)

BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a stored tensor before it is read.

    Attributes:
        dtype: As it is stored.
        shape: Sizes of its dimensions.
        nbytes: As it is stored.
        becomes: The dtype that it is to have in a part; `None`: its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    becomes: torch.dtype | None = None

    @property
    def final_dtype(self) -> torch.dtype:
        """The dtype that it ends up with."""
        return self.becomes or self.dtype

    @property
    def final_nbytes(self) -> int:
        """Its size once it has that."""
        return self.nbytes // self.dtype.itemsize * self.final_dtype.itemsize


def stored_as(info: TensorInfo) -> StoredTensor:
    """Return what a header says of a tensor."""
    return _stored_as(info.dtype, info.shape, info.nbytes)


@lru_cache(maxsize=1024)  # experts are all alike
def _stored_as(dtype: str, shape: tuple[int, ...], nbytes: int) -> StoredTensor:
    return StoredTensor(BY_STORED_NAME[dtype], shape, nbytes)


class TensorSource(Protocol):
    """An open checkpoint, or a whole model that is already in memory."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        ...

    def info(self, name: str) -> StoredTensor:
        """Return dtype and shape of one, without reading it."""
        ...

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Hear which tensors will be read, before the first is.

        A source that has to bring them from elsewhere does so now, and calls `progress` with
        (bytes done, bytes in all); what that raises ends it.
        """
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; it may share memory with the source."""
        ...

    def copied(self, tensor: torch.Tensor) -> None:
        """Hear that a tensor that was read has been copied; from any thread.

        It can be read again all the same.
        """
        ...

    def where(self, name: str) -> str:
        """Say where a tensor lies, for messages."""
        ...

    def close(self) -> None:
        """Let go of open files; tensors that were read remain valid."""
        ...


@runtime_checkable
class PlacedSource(Protocol):
    """A source whose tensors lie in files that can be read from any byte on."""

    def place(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file on this machine that holds a tensor that was prepared, and where."""
        ...


class SafetensorsSource:
    """A safetensors checkpoint, of one file or many, read by memory map.

    Files are fetched and opened when a tensor of theirs is first asked for.
    """

    def __init__(self, files: CheckpointFiles, weight_map: Mapping[str, str]) -> None:
        self._files = files
        self._weight_map = weight_map
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._open: dict[str, Any] = {}
        self._pages = MappedPages()

    @classmethod
    def of(cls, files: CheckpointFiles) -> SafetensorsSource:
        """Open the checkpoint among `files`: a single file, or an index with its shards.

        Where there are both the single file is taken: so does transformers.
        """
        index = None if files.find(SINGLE_FILE) else files.find(INDEX_FILE)
        if index is not None:
            return cls(files, read_index(index))
        return cls.single(files, SINGLE_FILE)

    @classmethod
    def single(cls, files: CheckpointFiles, file: str) -> SafetensorsSource:
        """Open one file by name."""
        source = cls(files, {})
        source._weight_map = dict.fromkeys(source._header(file), file)
        return source

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._weight_map.keys()

    def info(self, name: str) -> StoredTensor:
        """Return dtype and shape of one, from its file's header."""
        return stored_as(self._located(name)[1])

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Do nothing: tensors are mapped where they lie."""

    def read(self, name: str) -> torch.Tensor:
        """Map one tensor: no private copy is made until it is written to."""
        file = self._weight_map[name]
        if file not in self._open:
            self._open[file] = self._safe_open(file)
        try:
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.where(name)}: {name} can't be read: {in_one_line(error)}"
            ) from error
        return tensor

    def copied(self, tensor: torch.Tensor) -> None:
        """Let go of its pages."""
        self._pages.give_back(tensor)

    def place(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file that holds a tensor, and where in it."""
        file, info = self._located(name)
        return self._files.fetch(file), info

    def where(self, name: str) -> str:
        """Return the file that holds a tensor."""
        return self._files.describe(self._weight_map[name])

    def close(self) -> None:
        """Close the files; tensors that were read keep their mapping."""
        self._open.clear()

    def _located(self, name: str) -> tuple[str, TensorInfo]:
        file = self._weight_map[name]
        header = self._header(file)
        if name not in header:
            raise CheckpointError(
                f"{self._files.describe(INDEX_FILE)} says that {name} lies in {file}, but it is"
                " not there"
            )
        return file, header[name]

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._headers:
            self._headers[file] = read_header(self._files.fetch(file))
        return self._headers[file]

    def _safe_open(self, file: str) -> Any:
        path = self._files.fetch(file)
        self._header(file)
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} can't be opened: {in_one_line(error)}") from error


class StateDictSource:
    """Tensors that are already in memory: a whole model's state dict.

    Attributes:
        dtype: The one that the model was built with, where that is known.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor],
        description: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        self._tensors = dict(state_dict)
        self._description = description

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._tensors.keys()

    def info(self, name: str) -> StoredTensor:
        """Return dtype and shape of one."""
        tensor = self._tensors[name]
        return StoredTensor(tensor.dtype, tuple(tensor.shape), tensor.nbytes)

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Do nothing: the tensors are in memory."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor itself: the part shares its memory."""
        return self._tensors[name].detach()

    def copied(self, tensor: torch.Tensor) -> None:
        """Do nothing: others may have it, too."""

    def where(self, name: str) -> str:
        """Return what was given."""
        del name
        return self._description

    def close(self) -> None:
        """Let go of the tensors that no part took."""
        self._tensors.clear()


class TorchFileSource:
    """A checkpoint of `.bin`, `.pt` or `.pth` files that hold plain state dicts."""

    def __init__(self, files: CheckpointFiles, weight_map: Mapping[str, str]) -> None:
        self._files = files
        self._weight_map = weight_map

    @classmethod
    def of(cls, files: CheckpointFiles) -> TorchFileSource:
        """Open the checkpoint among `files`: as `SafetensorsSource.of` does."""
        index = None if files.find(BIN_FILE) else files.find(BIN_INDEX_FILE)
        if index is not None:
            return cls(files, read_index(index))
        return cls.single(files, BIN_FILE)

    @classmethod
    def single(cls, files: CheckpointFiles, file: str) -> TorchFileSource:
        """Open one file by name."""
        source = cls(files, {})
        source._weight_map = dict.fromkeys(source._state_dict(file), file)
        return source

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._weight_map.keys()

    def info(self, name: str) -> StoredTensor:
        """Return dtype and shape of one."""
        tensor = self.read(name)
        return StoredTensor(tensor.dtype, tuple(tensor.shape), tensor.nbytes)

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Do nothing: the files are read whole."""

    def read(self, name: str) -> torch.Tensor:
        """Map one tensor."""
        file = self._weight_map[name]
        tensors = self._state_dict(file)
        if name not in tensors:
            raise CheckpointError(
                f"{self._files.describe(BIN_INDEX_FILE)} says that {name} lies in {file}, but it"
                " is not there"
            )
        return tensors[name]

    def copied(self, tensor: torch.Tensor) -> None:
        """Do nothing: it stays until the file is closed."""

    def where(self, name: str) -> str:
        """Return the file that holds a tensor."""
        return self._files.describe(self._weight_map[name])

    def close(self) -> None:
        """Let go of the files; tensors that were read keep their mapping."""
        self._loaded.clear()

    @cached_property
    def _loaded(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}

    def _state_dict(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._loaded:
            self._loaded[file] = read_torch_file(self._files.fetch(file))
        return self._loaded[file]


def no_weights(files: CheckpointFiles) -> ModelSourceError:
    """Say what was looked for."""
    return ModelSourceError(
        f"no weights in {files.description}: neither {SINGLE_FILE}, {INDEX_FILE}, {BIN_FILE} nor"
        f" {BIN_INDEX_FILE} is there"
    )
