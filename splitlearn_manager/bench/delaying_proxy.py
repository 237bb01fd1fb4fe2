"""A TCP proxy that adds the round trip of a distant server, and counts what goes through it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Self

_RECEIVE_BYTES = 1 << 16


class DelayingProxy:
    """Listens on loopback, and passes all bytes on, each half a round trip later than it came.

    Bytes keep their order, and their rate is not limited.  Each connection is to begin with one
    HTTP request, whose `Host` becomes that of the server: a daemon on loopback wants its own.
    Threads of this process do the work: whoever measures waits for their bytes anyway.

    Args:
        host: Where the real server is.
        port: Its port.
        round_trip: Seconds that a question and its answer take longer; 0 only counts.

    Attributes:
        bytes_passed: Bytes that came in so far, of both directions, headers of frames included.
    """

    def __init__(self, host: str, port: int, round_trip: float) -> None:
        self._target = (host, port)
        self._half = round_trip / 2
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._mutex = threading.Lock()
        self.bytes_passed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        """Return the proxy itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every connection."""
        self._listener.close()
        with self._mutex:
            for connection in self._open:
                connection.close()

    def _accept(self) -> None:
        with suppress(OSError):  # until it is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                with self._mutex:
                    self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    renamed = source is near
                    take = threading.Thread(
                        target=self._take, args=(source, waiting, renamed), daemon=True
                    )
                    give = threading.Thread(target=self._give, args=(target, waiting), daemon=True)
                    take.start()
                    give.start()

    def _take(
        self,
        source: socket.socket,
        waiting: queue.SimpleQueue[tuple[float, bytes]],
        renamed: bool,
    ) -> None:
        """Note when bytes came; no bytes at all are the end."""
        data = b"-"
        own = self.url.removeprefix("http://").encode()
        servers = "{}:{}".format(*self._target).encode()
        while data:
            try:
                data = source.recv(_RECEIVE_BYTES)
            except OSError:
                data = b""
            with self._mutex:
                self.bytes_passed += len(data)
            waiting.put((time.monotonic() + self._half, data.replace(own, servers, int(renamed))))
            renamed = False

    def _give(self, target: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        """Pass bytes on when they are due."""
        with suppress(OSError):  # the other side is gone
            while True:
                due, data = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
