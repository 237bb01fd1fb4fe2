"""A model hub on loopback, in a process of its own: as much of its HTTP as fetching a part needs.

It adds a delay to each request and shares one rate among all connections, as a network does, and
counts the bytes that it sends.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from splitlearn_manager.bench.errors import BenchError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/[^/]+/[^/]+/resolve/(?:main|[0-9a-f]{40})/(?P<file>[^/]+)")
_RANGE = re.compile(r"bytes=(?P<first>\d+)-(?P<last>\d+)")
_SEND_BYTES = 256 * 1024


@dataclass
class HubServer:
    """A hub that is running.

    Attributes:
        address: `http://127.0.0.1:PORT`.
        process: It runs there.
    """

    address: str
    process: subprocess.Popen[str]

    def bytes_sent(self) -> int:
        """Return the bytes of all files sent so far, headers of HTTP left out."""
        if self.process.stdin is None or self.process.stdout is None:
            raise BenchError("the loopback hub can't be asked")
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def running_hub(folder: Path, latency: float, rate: float | None) -> Iterator[HubServer]:
    """Serve a checkpoint's folder under any name, for as long as the block lasts.

    Args:
        folder: Its files.
        latency: Seconds added to each request.
        rate: Bytes per second over all connections; `None` is as fast as it goes.

    Raises:
        BenchError: It does not start.
    """
    settings = json.dumps({"folder": str(folder), "latency": latency, "rate": rate})
    command = [sys.executable, "-m", "splitlearn_manager.bench.hub_server", settings]
    with subprocess.Popen(  # noqa: S603 - this very Python, and this module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            address = process.stdout.readline().strip() if process.stdout is not None else ""
            if not address:
                raise BenchError("the loopback hub did not start; see its message above")
            yield HubServer(address, process)
        finally:
            process.kill()


class _Meter:
    """Counts what is sent, and holds it to a rate."""

    def __init__(self, rate: float | None) -> None:
        self.sent = 0
        self._rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    def allow(self, nbytes: int) -> None:
        """Count bytes that are about to be sent, and wait until the rate allows for them."""
        with self._lock:
            self.sent += nbytes
            now = time.monotonic()
            if self._rate is not None:
                self._free_at = max(self._free_at, now) + nbytes / self._rate
            delay = self._free_at - now
        if delay > 0:
            time.sleep(delay)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, latency: float, rate: float | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.latency = latency
        self.meter = _Meter(rate)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that end a connection."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_HEAD(self) -> None:
        """Answer with a file's headers."""
        self._answer()

    def do_GET(self) -> None:
        """Answer with a file, or a range of it."""
        self._answer()

    def _answer(self) -> None:
        time.sleep(self.server.latency)
        match = _RESOLVE.fullmatch(unquote(urlsplit(self.path).path))
        path = self.server.folder / match["file"] if match else None
        if path is None or not path.is_file():
            self._refuse()
            return
        size = path.stat().st_size
        span = _RANGE.fullmatch(self.headers.get("Range") or "")
        start, end = (int(span["first"]), min(int(span["last"]) + 1, size)) if span else (0, size)
        self.send_response(206 if span else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{path.name}-{size}"')
        self.send_header("Content-Length", str(end - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self._send(path, start, end)

    def _send(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            while start < end:
                count = min(_SEND_BYTES, end - start)
                self.server.meter.allow(count)
                self.connection.sendfile(file, start, count)
                start += count

    def _refuse(self) -> None:
        self.send_response(404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def main() -> None:
    """Serve, print the address, and for each line of standard input the bytes sent so far."""
    settings = json.loads(sys.argv[1])
    server = _Server(Path(settings["folder"]), settings["latency"], settings["rate"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        sys.stdout.write(f"{server.meter.sent}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
