"""Headers and parts from the hub: from the cache where they are there, else in ranges."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from splitlearn_core.errors import CheckpointError, ModelSourceError, StorageError
from splitlearn_core.headers import LENGTH_BYTES, TensorInfo, header_length, listed, parse_header
from splitlearn_core.loading.fetch import FetchOptions, fetch_pieces
from splitlearn_core.loading.part_cache import Partial, RemoteHeader, locked, storing
from splitlearn_core.loading.ranges import lay_out, without
from splitlearn_core.loading.remote import AbsentFileError, RangesIgnoredError
from splitlearn_core.loading.retries import patiently
from splitlearn_core.loading.stale import remove_stale

if TYPE_CHECKING:
    from pathlib import Path

    from splitlearn_core.loading.hub import HubFiles
    from splitlearn_core.loading.ranges import Layout, Located, Piece, Span
    from splitlearn_core.loading.remote import Identity, RemoteFile
    from splitlearn_core.loading.stages import Progress

logger = logging.getLogger(__name__)

# Asked for first, where nothing is known of a header's length.  It costs a second request where
# the header is longer; a larger guess would cost bytes with each small model.
HEADER_GUESS = 8 * 1024
_COPY_BYTES = 4 * 1024 * 1024


class HubParts:
    """What is fetched of a model's weights files."""

    def __init__(self, files: HubFiles, options: FetchOptions | None = None) -> None:
        self._files = files
        self._options = options or FetchOptions(patience=files.patience)
        self._identities: dict[str, Identity] = {}

    def header(self, file: str, guess: int = HEADER_GUESS) -> dict[str, TensorInfo] | None:
        """Return the tensors of a file on the hub; `None` where there is no such file.

        Args:
            file: Its name.
            guess: How many bytes its header probably has.

        Raises:
            CheckpointError: The header is not sound.
            RangesIgnoredError: The hub sends whole files.
            FetchError: The hub can't be reached.
        """
        return self._kept_header(file) or self._new_header(file, guess)

    def obtain(self, tensors: Mapping[str, Located], progress: Progress) -> Path:
        """Return a file here that holds these tensors, fetching what is not here yet.

        Args:
            tensors: By name; the headers of their files have been asked for.
            progress: Called with (bytes done, bytes in all), in the calling thread; what it raises
                ends the fetch, which then goes on from there the next time.

        Raises:
            FetchError: See `fetch_pieces`; what has come in is kept for the next time.
            CheckpointError, StorageError, RangesIgnoredError: See there; nothing is kept.
            ModelSourceError: The hub refuses; or only the cache may be used, and it lacks some.
        """
        cache = self._files.parts
        total = sum(located.info.nbytes for located in tensors.values())
        if (path := cache.find(tensors)) is not None:
            return path
        if self._files.is_offline:
            self._check_held(tensors)
        final = cache.path_of(tensors)
        with locked(final, lambda: progress(0, total)):
            if (path := cache.find(tensors)) is None:
                self._fetch(final, tensors, progress, total)
        return path or final

    def _check_held(self, tensors: Mapping[str, Located]) -> None:
        """Refuse to begin without the hub what can't be put together from other parts' files."""
        cache = self._files.parts
        lacking = tensors.keys() - cache.held(tensors).keys()
        if lacking:
            raise ModelSourceError(
                f"{self._files.description}: not in {cache.folder}: {len(lacking)} tensors of this"
                f" part ({listed(lacking, limit=3)}); load it once with the hub in reach"
            )

    def _kept_header(self, file: str) -> dict[str, TensorInfo] | None:
        header = self._files.parts.header(file)
        try:
            return None if header is None else self._parse(file, header)
        except CheckpointError as error:
            logger.warning("the kept header is not usable: %s", error)
            return None

    def _new_header(self, file: str, guess: int) -> dict[str, TensorInfo] | None:
        header = None if self._files.is_offline else self._fetch_header(file, guess)
        if header is None:
            return None
        infos = self._parse(file, header)
        self._files.parts.keep_header(file, header)
        return infos

    def _parse(self, file: str, header: RemoteHeader) -> dict[str, TensorInfo]:
        self._identities[file] = header.identity
        return parse_header(header.text, header.identity.size, self._files.describe(file))

    def _fetch_header(self, file: str, guess: int) -> RemoteHeader | None:
        """Ask for a header; twice, where it is longer than was guessed."""
        remote = self._files.remote(file)
        try:
            begin = self._read(remote, 0, max(guess, LENGTH_BYTES))
        except AbsentFileError:
            return None
        if remote.identity is None:
            raise CheckpointError(f"{remote.label}: nothing is known of its content")
        end = LENGTH_BYTES + header_length(begin, remote.identity.size, remote.label)
        if end > len(begin):
            begin += self._read(remote, len(begin), end)
        return RemoteHeader(remote.identity, begin[LENGTH_BYTES:end])

    def _read(self, remote: RemoteFile, start: int, end: int) -> bytes:
        """Return a few bytes of a file."""

        def read() -> bytes:
            with remote.open(start, end, "its header") as answer:
                return b"".join(answer.chunks)

        return patiently(read, remote.label, self._options.patience)

    def _fetch(
        self, final: Path, tensors: Mapping[str, Located], progress: Progress, total: int
    ) -> None:
        """Fetch a part's file; the caller holds its lock."""
        remove_stale(self._files.parts_folder)
        files = sorted({located.file for located in tensors.values()})
        identities = {file: self._identities[file] for file in files}
        layout = lay_out(tensors, self._metadata())
        partial = Partial(final, layout, identities)
        try:
            with self._reporting(progress, total) as report:
                missing = self._reuse(layout, partial, tensors, report)
                done = total - _nbytes(missing)
                remotes = {file: self._files.remote(file, identities[file]) for file in files}
                self._say(missing, files)
                fetch_pieces(
                    missing, remotes, partial, self._options, lambda count: report(done + count)
                )
            partial.finish()
        except (CheckpointError, StorageError, RangesIgnoredError) as error:
            partial.discard()
            if isinstance(error, CheckpointError):
                self._forget_headers(files)
            raise

    def _forget_headers(self, files: list[str]) -> None:
        """Ask for headers again next time: they may be of another content than the bytes."""
        for file in files:
            self._files.parts.forget_header(file)

    def _reuse(
        self,
        layout: Layout,
        partial: Partial,
        tensors: Mapping[str, Located],
        report: Callable[[int], None],
    ) -> list[Piece]:
        """Return what has to be fetched: not what is there, nor what other parts' files hold."""
        held = self._files.parts.held(tensors)
        missing = without(layout.pieces, partial.resume())
        done = sum(located.info.nbytes for located in tensors.values()) - _nbytes(missing)
        copied: list[Span] = []
        for piece in missing:
            if piece.tensor in held:
                path, info = held[piece.tensor]
                offset = info.start - tensors[piece.tensor].info.start
                for span in _copy(path, offset, piece, partial.path):
                    copied.append(span)
                    done += span[1] - span[0]
                    report(done)
        partial.record(copied)
        return without(missing, copied)

    def _say(self, missing: list[Piece], files: list[str]) -> None:
        if missing:
            logger.info(
                "fetching %.1f MB of %s from %d of its files",
                _nbytes(missing) / 1e6, self._files.description, len(files),
            )  # fmt: skip

    def _metadata(self) -> dict[str, str]:
        """Return what a part's file says of itself."""
        return {"format": "pt", "model": self._files.repo_id, "commit": self._files.commit}

    @contextmanager
    def _reporting(self, progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar, if it was asked for, beside calling `progress`."""
        with progress_bar(self._files, total) as bar:

            def report(done: int) -> None:
                bar.update(done - bar.n)
                progress(done, total)

            yield report


def progress_bar(files: HubFiles, total: int) -> tqdm[Any]:
    """Return a bar with bytes, rate and time left; hidden unless it was asked for."""
    return tqdm(
        total=total,
        desc=files.repo_id,
        unit="B",
        unit_scale=True,
        disable=not files.progress_bar,
    )


def _nbytes(pieces: list[Piece]) -> int:
    return sum(piece.end - piece.start for piece in pieces)


def _copy(source: Path, offset: int, piece: Piece, target: Path) -> Iterator[Span]:
    """Copy a piece from a file that holds it, its bytes lying `offset` further on there."""
    with source.open("rb") as held, storing(target), target.open("r+b") as file:
        held.seek(piece.start + offset)
        file.seek(piece.target)
        end = piece.target_span[1]
        while (position := file.tell()) < end:
            data = held.read(min(_COPY_BYTES, end - position))
            if not data:
                return
            file.write(data)
            yield position, position + len(data)
