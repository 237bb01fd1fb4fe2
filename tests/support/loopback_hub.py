"""A model hub on loopback: as much of its HTTP as `huggingface_hub` and range requests need.

It can also misbehave as hubs and their content networks do: latency, a capped rate, ranges that
are ignored, wrong ranges and lengths, a file that changes, dropped connections, overload, large
files behind signed addresses on another host that expire.
"""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_REVISION = re.compile(r"main|[0-9a-f]{40}")
_RESOLVE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
_SIGNED = re.compile(r"^/signed/(?P<number>\d+)/(?P<repo>[^/]+/[^/]+)/(?P<file>.+)$")
_RANGE = re.compile(r"^bytes=(?P<start>\d+)-(?P<end>\d+)$")
_SEND_BYTES = 256 * 1024


@dataclass(frozen=True)
class Asked:
    """One request, as it came in.

    Attributes:
        revision: What it was asked of; empty at a signed address.
        number: How many GETs of this file came before.
        span: First byte and one past the last, where a range was asked for.
    """

    method: str
    revision: str
    file: str
    span: tuple[int, int] | None
    authorization: str | None
    host: str
    number: int


@dataclass(frozen=True)
class Fault:
    """What to do wrong in one answer.

    Attributes:
        status: Refuse with this status.
        headers: Headers to add, or to send in the place of the right ones.
        shift: Send bytes from that much further on, as the range that was asked for.
        cut: Leave off that many bytes at the end, and declare the shorter length.
        drop_after: Close the connection after that many bytes of the body.
        whole: Ignore the range.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    shift: int = 0
    cut: int = 0
    drop_after: int | None = None
    whole: bool = False


@dataclass
class LoopbackHub:
    """Serves the folder of each repository in `repos`, and notes what was asked for.

    Attributes:
        repos: `owner/name` -> folder.
        address: `http://127.0.0.1:PORT`, once it runs.
        fetched: File names whose bytes were asked for, in order.
        asked: Every request, in order.
        sent: Bytes of each file that were sent.
        commit: What `main` is; older ones can be asked for too.
        ranges: Whether ranges are honoured.
        token: Ask for this bearer token.
        latency: Seconds added to each request.
        rate: Bytes per second, over all connections.
        fault: Called with each GET; what it returns goes wrong.
        storage: A hub that holds the large files, to whose signed addresses this one redirects.
        signed_uses: How often a signed address can be used.
        hold_after: Stop in the middle, once that many bytes of weights are sent: `held` is set,
            and nothing moves until `released` is.
    """

    repos: dict[str, Path]
    address: str = ""
    fetched: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    commit: str = COMMIT
    ranges: bool = True
    token: str | None = None
    latency: float = 0.0
    rate: float | None = None
    fault: Callable[[Asked], Fault | None] | None = None
    storage: LoopbackHub | None = None
    signed_uses: int | None = None
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_at: float = 0.0
    _signed: int = 0
    _uses: Counter[int] = field(default_factory=Counter)
    _etags: dict[tuple[Path, int], str] = field(default_factory=dict)

    @contextmanager
    def run(self) -> Iterator[LoopbackHub]:
        """Serve for as long as the block lasts."""
        server = _Server(self)
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def gets(self, suffix: str = ".safetensors") -> list[Asked]:
        """Return the GETs of files whose names end so."""
        return [asked for asked in self.asked if self._is_get(asked, suffix)]

    @property
    def weights_sent(self) -> int:
        """Bytes of safetensors files that were sent."""
        return sum(n for file, n in self.sent.items() if file.endswith(".safetensors"))

    def sign(self, repo: str, file: str) -> str:
        """Return a new signed address of a file."""
        with self._lock:
            self._signed += 1
            return f"{self.address}/signed/{self._signed}/{repo}/{file}"

    def use(self, number: int) -> bool:
        """Use a signed address once; whether it still holds."""
        with self._lock:
            self._uses[number] += 1
            return self.signed_uses is None or self._uses[number] <= self.signed_uses

    def etag(self, path: Path) -> str:
        """Return a file's SHA-256, computed when the file changed."""
        key = (path, path.stat().st_mtime_ns)
        if key not in self._etags:
            with path.open("rb") as file:
                self._etags[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._etags[key]

    def note(self, method: str, revision: str, file: str, headers: Any) -> Asked:
        """Note a request."""
        match = _RANGE.match(headers.get("Range") or "")
        span = (int(match["start"]), int(match["end"]) + 1) if match else None
        with self._lock:
            before = sum(self._is_get(asked, file) for asked in self.asked)
            asked = Asked(
                method,
                revision,
                file,
                span,
                headers.get("Authorization"),
                headers.get("Host", ""),
                before,
            )
            self.asked.append(asked)
        return asked

    def allow(self, file: str, nbytes: int) -> None:
        """Count bytes that are about to be sent, and wait until the rate allows for them."""
        with self._lock:
            self.sent[file] += nbytes
            hold = self.hold_after is not None and self.weights_sent > self.hold_after
            delay = self._reserve(nbytes) if self.rate is not None else 0.0
        if hold:
            self.held.set()
            self.released.wait()
        if delay > 0:
            time.sleep(delay)

    def _reserve(self, nbytes: int) -> float:
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + nbytes / (self.rate or 1)
        return self._free_at - now

    @staticmethod
    def _is_get(asked: Asked, suffix: str) -> bool:
        return asked.method == "GET" and asked.file.endswith(suffix)


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """End connections too that wait for another request."""
        super().server_close()
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that end a connection; tests see to what matters."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> LoopbackHub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        if self.hub.latency:
            time.sleep(self.hub.latency)
        path = unquote(urlsplit(self.path).path)
        if match := _RESOLVE.match(path):
            self._resolve(match["repo"], match["revision"], match["file"])
        elif match := _SIGNED.match(path):
            self._signed(match["repo"], match["file"], int(match["number"]))
        else:
            self._refuse(404, "RepoNotFound")

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        asked = self.hub.note(self.command, revision, file, self.headers)
        folder = self.hub.repos.get(repo)
        if self.hub.token is not None and asked.authorization != f"Bearer {self.hub.token}":
            self._refuse(401, "GatedRepo")
        elif folder is None:
            self._refuse(404, "RepoNotFound")
        elif not _REVISION.fullmatch(revision):
            self._refuse(404, "RevisionNotFound")
        elif not (folder / file).is_file():
            self._refuse(404, "EntryNotFound")
        elif self.hub.storage is not None and file.endswith(".safetensors"):
            self._redirect(self.hub.storage.sign(repo, file), folder / file)
        else:
            self._serve(folder / file, asked)

    def _signed(self, repo: str, file: str, number: int) -> None:
        asked = self.hub.note(self.command, "", file, self.headers)
        if self.hub.use(number):
            self._serve(self.hub.repos[repo] / file, asked)
        else:
            self._refuse(403, None)

    def _redirect(self, location: str, path: Path) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("X-Linked-Etag", f'"{self.hub.etag(path)}"')
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _serve(self, path: Path, asked: Asked) -> None:
        fault = (
            self.hub.fault(asked) if self.hub.fault and asked.method == "GET" else None
        ) or Fault()
        if fault.status is not None:
            self._refuse(fault.status, None, fault.headers)
            return
        size = path.stat().st_size
        span = asked.span if self.hub.ranges and not fault.whole else None
        if span is not None and span[0] >= size:
            self._refuse(416, None, {"Content-Range": f"bytes */{size}"})
            return
        start, end = (span[0], min(span[1], size)) if span else (0, size)
        headers = {
            "X-Repo-Commit": self.hub.commit,
            "ETag": f'"{self.hub.etag(path)}"',
            "Content-Length": str(end - start - fault.cut),
        }
        if span is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.send_response(206 if span is not None else 200)
        for name, value in (headers | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if asked.method == "GET":
            self.hub.fetched.append(asked.file)
            self._send(path, asked.file, start + fault.shift, end - fault.cut, fault.drop_after)

    def _send(self, path: Path, file: str, start: int, end: int, limit: int | None) -> None:
        stop = end if limit is None else min(end, start + limit)
        with path.open("rb") as stored:
            stored.seek(start)
            while start < stop:
                data = stored.read(min(_SEND_BYTES, stop - start))
                self.hub.allow(file, len(data))
                try:
                    self.wfile.write(data)
                except OSError:  # the client has gone
                    self.close_connection = True
                    return
                start += len(data)
        self.close_connection = self.close_connection or stop < end

    def _refuse(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""
