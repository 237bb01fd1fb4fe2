"""Fetch the missing bytes of a part's file: few requests, several at a time, straight to disk.

Memory: what the network hands over at once (some 100 KB), for each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import TYPE_CHECKING, BinaryIO

from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.loading.part_cache import storing
from splitlearn_core.loading.ranges import merged, plan_requests
from splitlearn_core.loading.remote import AbsentFileError
from splitlearn_core.loading.retries import Patience, Retries, TransientError

if TYPE_CHECKING:
    from splitlearn_core.loading.part_cache import Partial
    from splitlearn_core.loading.ranges import Piece, Request, Span
    from splitlearn_core.loading.remote import Answer, RemoteFile

_MEBI = 1024 * 1024
# The caller hears of progress at least this often, so that it can end a fetch that stalls.
_REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch.

    Attributes:
        workers: Requests at a time.
        least_request: Runs of tensors are not cut into requests shorter than this, …
        most_request: … but into such as are no longer than this.
        record_bytes: How much may come in before the journal notes it.
        report_bytes: How much a worker takes in before it reports it.
        patience: When to ask again.
    """

    workers: int = 6
    least_request: int = 4 * _MEBI
    most_request: int = 64 * _MEBI
    record_bytes: int = 64 * _MEBI
    report_bytes: int = _MEBI
    patience: Patience = field(default_factory=Patience)

    def request_bytes(self, total: int) -> int:
        """Return the longest request: short enough that all workers end at about the same time."""
        return min(self.most_request, max(self.least_request, total // (4 * self.workers)))


def fetch_pieces(
    pieces: Sequence[Piece],
    remotes: Mapping[str, RemoteFile],
    partial: Partial,
    options: FetchOptions,
    report: Callable[[int], None],
) -> None:
    """Fetch `pieces` into a part's file, in threads of its own that end with the call.

    Args:
        pieces: What is missing.
        remotes: The files they lie in.
        partial: Where they go; what has come in is noted there, however the call ends.
        options: How to fetch.
        report: Called in the calling thread with the bytes fetched so far, a few times a second.
            What it raises ends the fetch.

    Raises:
        FetchError: The hub failed, again and again.
        CheckpointError: It sent something else than it was asked for.
        StorageError: The disk is full, or can't be written.
        RangesIgnoredError: The hub sends whole files.
        ModelSourceError: It refuses.
    """
    total = sum(piece.end - piece.start for piece in pieces)
    requests = plan_requests(pieces, options.request_bytes(total))
    _Fetch(remotes, partial, options, report).run(requests)


class _Fetch:
    """One call of `fetch_pieces`: its workers, and the calling thread that follows them."""

    def __init__(
        self,
        remotes: Mapping[str, RemoteFile],
        partial: Partial,
        options: FetchOptions,
        report: Callable[[int], None],
    ) -> None:
        self._remotes = remotes
        self._partial = partial
        self._options = options
        self._report = report
        self._stop = Event()
        self._news: SimpleQueue[list[Span] | Future[None]] = SimpleQueue()
        self._unrecorded: list[Span] = []
        self._done = 0
        self._answers: set[Answer] = set()
        self._lock = Lock()

    def run(self, requests: Sequence[Request]) -> None:
        """Fetch all, or leave no thread behind and raise what went wrong."""
        with ThreadPoolExecutor(self._options.workers, "splitlearn-fetch") as pool:
            try:
                for request in requests:
                    pool.submit(self._fetch, request).add_done_callback(self._news.put)
                self._follow(len(requests))
            except BaseException:
                self._end()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                self._collect()

    def _follow(self, unfinished: int) -> None:
        """Report and record what the workers bring, until all requests are done."""
        while unfinished:
            try:
                news = self._news.get(timeout=_REPORT_SECONDS)
            except Empty:
                news = []
            if isinstance(news, Future):
                unfinished -= 1
                news.result()
            else:
                self._take(news)
            self._report(self._done)

    def _take(self, spans: list[Span]) -> None:
        """Count spans that came in, and record them when they are many."""
        self._done += sum(end - start for start, end in spans)
        self._unrecorded += spans
        if sum(end - start for start, end in self._unrecorded) >= self._options.record_bytes:
            self._partial.record(self._unrecorded)
            self._unrecorded = []

    def _collect(self) -> None:
        """Record what came in last; the workers have ended."""
        with suppress(Empty):
            while True:
                news = self._news.get_nowait()
                if not isinstance(news, Future):
                    self._unrecorded += news
        self._partial.record(self._unrecorded)

    def _end(self) -> None:
        """Let the workers end at once, those too that wait for a server."""
        self._stop.set()
        with self._lock:
            for answer in self._answers:
                answer.abort()

    def _fetch(self, request: Request) -> None:
        """Fetch one request, going on where a connection broke off."""
        transfer = _Transfer(request, self._options.report_bytes, self._news)
        label = f"{self._remotes[request.file].label} ({transfer.names})"
        retries = Retries(self._options.patience, label, self._stop)
        with transfer.into(self._partial) as file:
            while not (transfer.is_done or self._stop.is_set()):
                before = transfer.position
                try:
                    self._receive(transfer, file)
                except TransientError as error:
                    if transfer.position > before:
                        retries.progressed()
                    if not self._stop.is_set():
                        retries.failed(error)

    def _receive(self, transfer: _Transfer, file: BinaryIO) -> None:
        """Take in what is missing of a request, until the connection ends or the fetch does."""
        remote = self._remotes[transfer.request.file]
        try:
            with (
                remote.open(transfer.position, transfer.request.end, transfer.names) as answer,
                self._abortable(answer),
            ):
                for chunk in answer.chunks:
                    transfer.write(file, chunk)
                    if self._stop.is_set():
                        return
        except AbsentFileError as error:
            raise CheckpointError(f"{error}: the hub no longer has the file") from error

    @contextmanager
    def _abortable(self, answer: Answer) -> Iterator[None]:
        """Let `_end` reach an answer."""
        with self._lock:
            self._answers.add(answer)
            if self._stop.is_set():
                answer.abort()
        try:
            yield
        finally:
            with self._lock:
                self._answers.discard(answer)


class _Transfer:
    """How far one request is."""

    def __init__(
        self, request: Request, report_bytes: int, news: SimpleQueue[list[Span] | Future[None]]
    ) -> None:
        self.request = request
        self.position = request.start
        self._report_bytes = report_bytes
        self._news = news
        self._written: list[Span] = []
        self._unreported = 0

    @property
    def is_done(self) -> bool:
        return self.position >= self.request.end

    @property
    def names(self) -> str:
        """The tensors that it brings, for messages."""
        return listed({piece.tensor for piece in self.request.pieces}, limit=3)

    @contextmanager
    def into(self, partial: Partial) -> Iterator[BinaryIO]:
        """Open the part's file, and report what was written, however that ends."""
        with storing(partial.path):
            file = partial.path.open("r+b", buffering=0)
        with file:
            try:
                yield file
            finally:
                self._tell()

    def write(self, file: BinaryIO, chunk: bytes) -> None:
        """Put what is wanted of a chunk where it belongs."""
        start, self.position = self.position, self.position + len(chunk)
        view = memoryview(chunk)
        for piece in self.request.kept(start, self.position):
            _write_at(file, piece.target, view[piece.start - start : piece.end - start])
            self._written.append(piece.target_span)
        self._unreported += len(chunk)
        if self._unreported >= self._report_bytes:
            self._tell()

    def _tell(self) -> None:
        self._news.put(merged(self._written))
        self._written, self._unreported = [], 0


def _write_at(file: BinaryIO, position: int, data: memoryview) -> None:
    """Write all of `data`; a raw file may take it in several bites."""
    with storing(file.name):
        file.seek(position)
        while data:
            data = data[file.write(data) :]
