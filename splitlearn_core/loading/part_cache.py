"""Fetched parts on disk: finished files, half-fetched ones with their journals, kept headers.

    <folder of one model at one commit>/
      headers/FILE.header    what identifies FILE (a line of JSON), then its header as it came
      KEY.safetensors        a part: a file that is here is whole
      KEY.partial            a part that is being fetched, at its full length
      KEY.journal            which of its bytes are there
      KEY.lock               held by whoever fetches it

KEY stands for the set of tensors.  A finished file is never written to again, so that it may stay
mapped; to make room, delete whatever you like.  Unfinished files that nobody goes on with, and
locks, are removed after a while: `stale.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # no __all__ there

from splitlearn_core.errors import CheckpointError, StorageError
from splitlearn_core.headers import TensorInfo, read_header
from splitlearn_core.loading.ranges import Layout, Located, Span, merged
from splitlearn_core.loading.remote import Identity

logger = logging.getLogger(__name__)

_JOURNAL_VERSION = 1
# How often somebody who waits for a part that another fetches looks whether to go on waiting.
_LOCK_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class RemoteHeader:
    """The header of a file on the hub.

    Attributes:
        identity: Length and ETag of the file.
        text: The JSON part.
    """

    identity: Identity
    text: bytes


class PartCache:
    """The fetched parts of one model at one commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def header(self, file: str) -> RemoteHeader | None:
        """Return the header of a file on the hub, if it was kept."""
        try:
            identity, _, text = self._header_path(file).read_bytes().partition(b"\n")
            fields = json.loads(identity)
            return RemoteHeader(Identity(int(fields["size"]), str(fields["etag"])), text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not usable (%s): asking the hub", self._header_path(file), error)
            return None

    def keep_header(self, file: str, header: RemoteHeader) -> None:
        """Keep the header of a file on the hub."""
        identity = json.dumps(asdict(header.identity)).encode()
        write_atomically(self._header_path(file), identity + b"\n" + header.text)

    def forget_header(self, file: str) -> None:
        """Ask the hub for a file's header again next time."""
        self._header_path(file).unlink(missing_ok=True)

    def path_of(self, tensors: Mapping[str, Located]) -> Path:
        """Return where a part of these tensors lies, or will."""
        names = "\n".join(f"{located.file}\t{name}" for name, located in sorted(tensors.items()))
        key = hashlib.sha256(names.encode()).hexdigest()[:32]
        return self.folder / f"{key}.safetensors"

    def find(self, tensors: Mapping[str, Located]) -> Path | None:
        """Return a finished file that holds all these tensors: their own, or a larger part's."""
        own = self.path_of(tensors)
        for path in (own, *(path for path in self._finished() if path != own)):
            stored = self._read(path)
            if stored is not None and all(_fits(stored, n, t) for n, t in tensors.items()):
                with suppress(OSError):  # of a fetch that was killed at its last step
                    path.with_suffix(".journal").unlink(missing_ok=True)
                return path
        return None

    def held(self, tensors: Mapping[str, Located]) -> dict[str, tuple[Path, TensorInfo]]:
        """Return those of the tensors that finished files of other parts hold, and where."""
        held: dict[str, tuple[Path, TensorInfo]] = {}
        for path in self._finished():
            stored = self._read(path) or {}
            held |= {n: (path, stored[n]) for n, t in tensors.items() if _fits(stored, n, t)}
        return held

    def _finished(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _read(self, path: Path) -> dict[str, TensorInfo] | None:
        """Return a finished file's header; a damaged file is taken away."""
        if not path.is_file():
            return None
        try:
            return read_header(path)
        except CheckpointError as error:
            logger.warning("%s: taken away, to be fetched again", error)
            path.unlink(missing_ok=True)
            return None

    def _header_path(self, file: str) -> Path:
        return self.folder / "headers" / f"{file}.header"


class Partial:
    """The file of a part while it is fetched; at its full length from the start."""

    def __init__(self, final: Path, layout: Layout, sources: Mapping[str, Identity]) -> None:
        """Name the file.

        Args:
            final: What it is called once it is whole.
            layout: What it will hold.
            sources: What its bytes are taken from; those of other contents are of no use to it.
        """
        self.path = final.with_suffix(".partial")
        self._final = final
        self._layout = layout
        self._journal = final.with_suffix(".journal")
        self._heading = _heading(layout, sources)

    def resume(self) -> list[Span]:
        """Return what is there already; where that can't be known, begin again.

        Raises:
            StorageError: There is no room for what is missing, or no right to write.
        """
        done = self._recorded()
        missing = self._layout.size - sum(end - start for start, end in done)
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            check_space(self.path.parent, missing)
            if not done:
                self._begin()
        return done

    def record(self, spans: Iterable[Span]) -> None:
        """Note that spans are there, once they would outlast a power cut."""
        lines = "".join(f"{start} {end}\n" for start, end in merged(spans))
        if lines:
            with storing(self.path):
                _sync(self.path)
                with self._journal.open("a", encoding="ascii") as journal:
                    journal.write(lines)

    def finish(self) -> None:
        """Give the file its name, once it is whole and on the disk."""
        with storing(self.path):
            _sync(self.path)
            read_header(self.path)
            self.path.replace(self._final)
            _sync_folder(self._final.parent)
            self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing."""
        self._journal.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Make the file; the journal comes last, and vouches for the file that it finds."""
        self.discard()
        with self.path.open("wb") as file:
            file.write(self._layout.prefix)
            file.truncate(self._layout.size)
        write_atomically(self._journal, self._heading)

    def _recorded(self) -> list[Span]:
        """Return the spans of the journal, if it and the file belong to this layout."""
        try:
            heading, *lines = self._journal.read_bytes().splitlines(keepends=True)
            with self.path.open("rb") as file:
                prefix = file.read(len(self._layout.prefix))
                size = file.seek(0, os.SEEK_END)
        except (OSError, ValueError):
            return []
        if (heading, prefix, size) != (self._heading, self._layout.prefix, self._layout.size):
            return []
        begin = (0, len(self._layout.prefix))
        return merged([begin, *_spans(lines, self._layout.size)])


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that goes with a part's file, against threads and processes alike.

    Args:
        path: The part's file.
        waiting: Called now and then as long as somebody else holds it; may raise.
    """
    lock = path.with_suffix(".lock")
    with storing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(lock, timeout=_LOCK_POLL_SECONDS))
                break
            except TimeoutError:
                if not waited:
                    logger.info("%s: somebody else is fetching it; waiting", path)
                waited = True
                waiting()
        yield


@contextmanager
def storing(path: Path | str) -> Iterator[None]:
    """Turn what goes wrong with writing into a `StorageError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}; make room there, or name another"
            " cache_dir",
            error.errno,
        ) from error


def check_space(folder: Path, nbytes: int) -> None:
    """Refuse to begin what can't end: `nbytes` must be free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise StorageError(
            f"{folder} has {free} bytes free, the part needs {nbytes}; make room there, or name"
            " another cache_dir"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file beside its place, and put it there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _fits(stored: Mapping[str, TensorInfo], name: str, located: Located) -> bool:
    """Whether a file holds a tensor, of the dtype and shape that it should have."""
    info = stored.get(name)
    wanted = located.info
    return info is not None and (info.dtype, info.shape) == (wanted.dtype, wanted.shape)


def _heading(layout: Layout, sources: Mapping[str, Identity]) -> bytes:
    """Return the journal's first line: what must be equal for its spans to be of use."""
    heading = {
        "version": _JOURNAL_VERSION,
        "header": hashlib.sha256(layout.prefix).hexdigest(),
        "sources": {file: asdict(identity) for file, identity in sorted(sources.items())},
    }
    return json.dumps(heading).encode() + b"\n"


def _spans(lines: Iterable[bytes], size: int) -> Iterator[Span]:
    """Return the spans that a journal's lines note; a line that was cut off ends them."""
    for line in lines:
        start, _, end = line.strip().partition(b" ")
        if not (line.endswith(b"\n") and start.isdigit() and end.isdigit()):
            return
        if not int(start) <= int(end) <= size:
            return
        yield int(start), int(end)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Let a rename outlast a power cut, where folders can be synced (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
