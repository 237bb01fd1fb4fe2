"""The tensors of a model on the hub: of each part, only the bytes that it needs are fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE, listed, read_header, read_index
from splitlearn_core.loading.files import FolderFiles
from splitlearn_core.loading.generation import GENERATION_CONFIG_FILE
from splitlearn_core.loading.hub_parts import HEADER_GUESS, HubParts
from splitlearn_core.loading.pages import MappedPages
from splitlearn_core.loading.ranges import Located
from splitlearn_core.loading.remote import RangesIgnoredError
from splitlearn_core.loading.sources import (
    BIN_FILE,
    BIN_INDEX_FILE,
    TorchFileSource,
    no_weights,
    stored_as,
)
from splitlearn_core.loading.stages import LoadStage, enter_stage
from splitlearn_core.messages import in_one_line
from splitlearn_core.shape import CONFIG_FILE

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from splitlearn_core.headers import TensorInfo
    from splitlearn_core.loading.fetch import FetchOptions
    from splitlearn_core.loading.hub import HubFiles
    from splitlearn_core.loading.sources import StoredTensor, TensorSource
    from splitlearn_core.loading.stages import Progress

logger = logging.getLogger(__name__)

# What a header takes for a tensor beside its name, and for itself: a little more than usual.
_ENTRY_BYTES = 88
_FRAME_BYTES = 256


class HubSource:
    """A safetensors checkpoint on the hub, of one file or many.

    Headers are asked for when a tensor of their file is first looked at, bytes when a part is
    prepared.  Where the hub's server ignores ranges, whole files are fetched instead, and that is
    said.  What is read is mapped from a file in the cache.
    """

    def __init__(self, files: HubFiles, parts: HubParts, weight_map: Mapping[str, str]) -> None:
        self._files = files
        self._parts = parts
        self._weight_map = weight_map
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._homes: dict[str, Path] = {}
        self._home_headers: dict[Path, dict[str, TensorInfo]] = {}
        self._open: dict[Path, Any] = {}
        self._pages = MappedPages()

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._weight_map.keys()

    def info(self, name: str) -> StoredTensor:
        """Return dtype and shape of one, from its file's header."""
        return stored_as(self._located(name).info)

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Bring the bytes of a part here, those that are not yet."""
        wanted = {name: self._located(name) for name in names}
        total = sum(located.info.nbytes for located in wanted.values())
        here = self._whole_files(wanted)
        self._homes |= {name: here[t.file] for name, t in wanted.items() if t.file in here}
        remote = {name: t for name, t in wanted.items() if name not in self._homes}
        done = total - sum(located.info.nbytes for located in remote.values())

        def report(count: int, _: int) -> None:
            if progress is not None:
                progress(done + count, total)

        if remote:
            enter_stage(progress, LoadStage.DOWNLOADING)
            self._obtain(remote, report)

    def read(self, name: str) -> torch.Tensor:
        """Map one tensor: no private copy is made until it is written to."""
        if name not in self._homes:
            self.prepare((name,))
        path = self._homes[name]
        if path not in self._open:
            self._open[path] = _safe_open(path)
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor

    def place(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file in the cache that holds a tensor, and where in it."""
        if name not in self._homes:
            self.prepare((name,))
        path = self._homes[name]
        if path not in self._home_headers:
            self._home_headers[path] = read_header(path)
        return path, self._home_headers[path][name]

    def missing_bytes(self, names: Iterable[str]) -> int:
        """Return how many bytes of some tensors are not on this machine yet."""
        wanted = {name: self._located(name) for name in names}
        here = self._whole_files(wanted)
        remote = {name: located for name, located in wanted.items() if located.file not in here}
        held = self._files.parts.held(remote)
        return sum(located.info.nbytes for name, located in remote.items() if name not in held)

    def copied(self, tensor: torch.Tensor) -> None:
        """Let go of its pages."""
        self._pages.give_back(tensor)

    def where(self, name: str) -> str:
        """Return the file that holds a tensor."""
        return self._files.describe(self._weight_map[name])

    def close(self) -> None:
        """Close the files; tensors that were read keep their mapping."""
        self._open.clear()

    def _located(self, name: str) -> Located:
        file = self._weight_map[name]
        if file not in self._headers:
            self._headers[file] = self._header(file)
        header = self._headers[file]
        if name not in header:
            raise CheckpointError(
                f"{self._files.describe(INDEX_FILE)} says that {name} lies in {file}, but it is"
                " not there"
            )
        return Located(file, header[name])

    @cached_property
    def _names_by_file(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name, file in self._weight_map.items():
            names.setdefault(file, []).append(name)
        return names

    def _whole_files(self, tensors: Mapping[str, Located]) -> dict[str, Path]:
        """Return where the files lie that are here as a whole."""
        paths = {file: self._files.local(file) for file in {t.file for t in tensors.values()}}
        return {file: path for file, path in paths.items() if path is not None}

    def _header(self, file: str) -> dict[str, TensorInfo]:
        path = self._files.local(file)
        if path is not None:
            return read_header(path)
        names = self._names_by_file[file]
        guess = _FRAME_BYTES + sum(len(name.encode()) + _ENTRY_BYTES for name in names)
        header = header_or_whole(self._files, self._parts, file, guess)
        if header is None:
            raise CheckpointError(
                f"{self._files.describe(INDEX_FILE)} names {file}, with {listed(names, limit=3)}:"
                f" {self._files.missing}"
            )
        return header

    def _obtain(self, tensors: Mapping[str, Located], progress: Progress) -> None:
        try:
            path = self._parts.obtain(tensors, progress)
        except RangesIgnoredError:
            self._fetch_whole(tensors, progress)
            here = self._whole_files(tensors)
            self._homes |= {name: here[t.file] for name, t in tensors.items()}
        else:
            self._homes |= dict.fromkeys(tensors, path)

    def _fetch_whole(self, tensors: Mapping[str, Located], progress: Progress) -> None:
        """Fetch whole files: the server has them no other way.

        Of what comes in, the share that is wanted is reported.
        """
        _warn_whole(self._files)
        names = sorted({located.file for located in tensors.values()})
        wanted = sum(located.info.nbytes for located in tensors.values())
        total = sum(max(info.end for info in self._headers[name].values()) for name in names)
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done = min(done + count, total)
            progress(wanted * done // total, wanted)

        for name in names:
            self._files.fetch(name, report)


def open_hub_source(files: HubFiles, options: FetchOptions | None = None) -> TensorSource:
    """Open the checkpoint of a model on the hub: safetensors where there are any, else `.bin`.

    Args:
        files: The model.
        options: How to fetch.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There are no weights, or not in the cache, where
            only that may be used.
    """
    source = _open_safetensors(files, HubParts(files, options))
    if source is not None:
        return source
    logger.warning(
        "%s has no safetensors; of .bin files no part can be fetched alone, so whole files are",
        files.description,
    )
    if any(files.local(name) or files.find(name) for name in (BIN_INDEX_FILE, BIN_FILE)):
        return TorchFileSource.of(files)
    raise no_weights(files)


def _open_safetensors(files: HubFiles, parts: HubParts) -> HubSource | None:
    header = _single_header(files, parts)
    if header is not None:
        return HubSource(files, parts, dict.fromkeys(header, SINGLE_FILE))
    index = files.find(INDEX_FILE)
    return None if index is None else HubSource(files, parts, read_index(index))


def _single_header(files: HubFiles, parts: HubParts) -> dict[str, TensorInfo] | None:
    """Return the header of the single file; `None` where there is none.

    An index is fetched only after the single file was looked for, here and by transformers: where
    it is in the cache, and the file is not, the hub need not be asked again.
    """
    path = files.local(SINGLE_FILE)
    if path is not None:
        return read_header(path)
    if files.local(INDEX_FILE) is not None:
        return None
    return header_or_whole(files, parts, SINGLE_FILE, HEADER_GUESS)


def header_or_whole(
    files: HubFiles, parts: HubParts, file: str, guess: int
) -> dict[str, TensorInfo] | None:
    """Return a file's header; where the server ignores ranges, of the whole file."""
    try:
        return parts.header(file, guess)
    except RangesIgnoredError:
        _warn_whole(files)
        return read_header(files.fetch(file))


def fetch_whole(files: HubFiles) -> FolderFiles:
    """Return a folder with the whole checkpoint, fetching what is not here yet."""
    names = (CONFIG_FILE, *_weights(files))
    for folder in files.whole_folders:
        if all((folder / name).is_file() for name in names):
            return FolderFiles(folder)
    for name in names:
        if files.find(name) is None:
            raise CheckpointError(f"{files.describe(name)}: {files.missing}")
    files.find(GENERATION_CONFIG_FILE)
    return FolderFiles(files.whole_folders[0])


def _weights(files: HubFiles) -> list[str]:
    """Return the names of the weights files, safetensors where there are any."""
    for single, index_name in ((SINGLE_FILE, INDEX_FILE), (BIN_FILE, BIN_INDEX_FILE)):
        if files.local(single) or files.find(single):
            return [single]
        index = files.find(index_name)
        if index is not None:
            return [index_name, *sorted(set(read_index(index).values()))]
    raise no_weights(files)


def _warn_whole(files: HubFiles) -> None:
    logger.warning(
        "%s: the server ignores Range requests, so whole files are fetched, not only the bytes of"
        " the part",
        files.description,
    )


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be opened: {in_one_line(error)}") from error
