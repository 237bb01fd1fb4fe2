"""One file on a hub, read in ranges, every answer checked.

Requests go through `huggingface_hub`'s own session, so its settings, proxies and certificates
hold.  A large file lies behind a redirect to signed storage: where that leads is remembered for the
next range, until the storage refuses, and the token is never sent there.

Protocol: RFC 9110, section 14 (range requests) and 8.8.3 (ETag).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    httpx,
    parse_ratelimit_headers,
)

from splitlearn_core.errors import CheckpointError, FetchError, ModelSourceError
from splitlearn_core.loading.retries import TransientError
from splitlearn_core.messages import in_one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

_RETRIED = {408, 429, 500, 502, 503, 504}
_REFUSED = {401, 403}
_GONE = {404, 410}
_PARTIAL = 206
_WHOLE = 200
_UNSATISFIABLE = 416
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RangesIgnoredError(Exception):
    """The server sends whole files, whatever range is asked for."""


class AbsentFileError(Exception):
    """The hub has no such file."""


@dataclass(frozen=True)
class Identity:
    """What tells one content of a file from another.

    Attributes:
        size: Length in bytes.
        etag: The hub's name for the content.
    """

    size: int
    etag: str


@dataclass(frozen=True)
class _Storage:
    """Where the hub redirected to: a signed address, never to be shown or kept."""

    url: str
    etag: str


@dataclass(frozen=True)
class Answer:
    """A range that is being sent.

    Attributes:
        end: One past its last byte.
        chunks: Its bytes, as they come in.
        connection: What they come in through.
    """

    end: int
    chunks: Iterator[bytes]
    connection: Any

    def abort(self) -> None:
        """End the connection, from any thread; whoever waits for a chunk gets an error at once."""
        connection = self.connection.get_extra_info("socket") if self.connection else None
        if connection is not None:
            with suppress(OSError):  # it has ended on its own
                connection.shutdown(socket.SHUT_RDWR)


class RemoteFile:
    """A file on the hub at one commit.

    Every answer must be of that commit, and of the content that the first answer was of.  May be
    used by several threads.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        label: str,
        commit: str,
        identity: Identity | None = None,
    ) -> None:
        """Name a file.

        Args:
            url: Its address on the hub.
            headers: What to send with each request; `authorization` goes to the hub alone.
            label: Names the file in messages.
            commit: What the address is pinned to.
            identity: What is known of the content from an earlier time.
        """
        self.label = label
        self.identity = identity
        self._url = url
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._commit = commit
        self._lock = Lock()
        self._storage: _Storage | None = None
        self._storage_served = False
        self._remembers_storage = True

    @contextmanager
    def open(self, start: int, end: int, what: str = "") -> Iterator[Answer]:
        """Ask for the bytes `[start, end)`, or what there is of them.

        Args:
            start: First byte.
            end: One past the last; where the file is shorter, `Answer.end` is its end.
            what: What lies there, for messages.

        Raises:
            TransientError: Asking again may help; also while the chunks are read.
            RangesIgnoredError: The whole file would come.
            AbsentFileError: There is no such file.
            CheckpointError: The answer is not what was asked for, or the file has changed.
            ModelSourceError: The hub refuses.
        """
        label = f"{self.label} ({what})" if what else self.label
        storage = self._storage
        try:
            with get_session().stream(
                "GET",
                storage.url if storage else self._url,
                headers=self._request_headers(storage, start, end),
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
            ) as response:
                self._check_status(response, storage, label)
                last = self._check_range(response, start, end, label)
                self._check_identity(response, storage, label)
                chunks = _counted(response.iter_raw(), last - start, label)
                yield Answer(last, chunks, response.extensions.get("network_stream"))
        except httpx.HTTPError as error:
            raise TransientError(in_one_line(error)) from error

    def _request_headers(self, storage: _Storage | None, start: int, end: int) -> dict[str, str]:
        headers = {**self._headers, "range": f"bytes={start}-{end - 1}"}
        headers["accept-encoding"] = "identity"  # offsets are those of the file as it is stored
        if storage is not None and not _same_origin(storage.url, self._url):
            headers.pop("authorization", None)
        return headers

    def _check_status(self, response: Any, storage: _Storage | None, label: str) -> None:
        status = response.status_code
        if status == _PARTIAL:
            return
        if status in _RETRIED:
            raise TransientError(f"the answer is {status}", _retry_after(response.headers))
        if storage is not None and status in _REFUSED | _GONE:
            self._forget_storage()
            raise TransientError("the storage's address has expired", 0.0)
        if status in _REFUSED:
            raise ModelSourceError(
                f"{label}: the hub refuses ({status}"
                f"{_reason(response)}); ask for access to the model, and set HF_TOKEN"
            )
        if status in _GONE:
            raise AbsentFileError(label)
        if status == _WHOLE:
            raise RangesIgnoredError(label)
        if status == _UNSATISFIABLE:
            raise CheckpointError(f"{label}: the hub says that the file ends before those bytes")
        raise FetchError(f"{label}: the answer is {status}{_reason(response)}")

    def _check_range(self, response: Any, start: int, end: int, label: str) -> int:
        """Return where the range that is sent ends; an error unless it is what was asked for."""
        said = response.headers.get("content-range", "nothing")
        match = _CONTENT_RANGE.fullmatch(said)
        first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
        length = response.headers.get("content-length", str(last + 1 - start))
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        wrong = first != start or last + 1 != min(end, size) or length != str(last + 1 - start)
        if wrong or encoded:
            raise CheckpointError(
                f"{label}: asked for the bytes {start}-{end - 1}, the answer says {said}, and"
                f" {length} bytes{' encoded' if encoded else ''}; nothing of it is used"
            )
        with self._lock:
            if self.identity is not None and self.identity.size != size:
                raise CheckpointError(
                    f"{label}: the file has {size} bytes, it had {self.identity.size} before"
                )
        return last + 1

    def _check_identity(self, response: Any, storage: _Storage | None, label: str) -> None:
        """Compare commit and content with what they were; keep what the first answer says."""
        with self._lock:
            if storage is not None:
                self._storage_served = True
                _compare(label, _etag(response), storage.etag)
                return
            answer = (response.history or [response])[0]
            commit = answer.headers.get("x-repo-commit", self._commit)
            if commit != self._commit:
                raise CheckpointError(f"{label}: of commit {commit}, not {self._commit}")
            etag = _plain(answer.headers.get("x-linked-etag", "")) or _etag(answer)
            if self.identity is None:
                self.identity = Identity(_size(response), etag)
            _compare(label, etag, self.identity.etag)
            if response.history and self._remembers_storage:
                self._storage = _Storage(str(response.url), _etag(response))

    def _forget_storage(self) -> None:
        """Ask the hub again; where its addresses never hold for two requests, do so each time."""
        with self._lock:
            self._remembers_storage = self._storage_served
            self._storage = None


def _counted(chunks: Iterator[bytes], expected: int, label: str) -> Iterator[bytes]:
    """Hand chunks on; an error where they are not `expected` bytes in all."""
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if count > expected:
            raise CheckpointError(f"{label}: more bytes came than the {expected} asked for")
        yield chunk
    if count < expected:
        raise TransientError(f"cut off after {count} of {expected} bytes")


def _compare(label: str, etag: str, before: str) -> None:
    """Compare contents by their ETags."""
    if etag != before:
        raise CheckpointError(
            f"{label}: the file changed while it was fetched (its ETag is {etag!r}, it was"
            f" {before!r}); nothing of it is used"
        )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds after which to ask again, where the answer says so.

    The hub tells when its window ends; others send `Retry-After`, whose other form, a date, counts
    as none.
    """
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("retry-after", "").strip()
    return float(value) if value.isdecimal() else None


def _reason(response: Any) -> str:
    message = response.headers.get("x-error-message")
    return f", {message}" if message else ""


def _size(response: Any) -> int:
    return int(response.headers["content-range"].rpartition("/")[2])


def _etag(response: Any) -> str:
    return _plain(response.headers.get("etag", ""))


def _plain(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _same_origin(one: str, other: str) -> bool:
    return urlsplit(one)[:2] == urlsplit(other)[:2]
