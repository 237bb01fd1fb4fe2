"""What goes between a client and a daemon, and can be cut, in the middle of a frame as well."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

_PIECE = 1 << 16


class _Pair:
    """Two ends of one connection, which are closed when nobody carries between them any more."""

    def __init__(self, *ends: socket.socket) -> None:
        self._ends = ends
        self._carriers = 2
        self._is_shut = False

    def shut(self) -> bool:
        """Let nothing more pass; return whether something did."""
        was_shut, self._is_shut = self._is_shut, True
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return not was_shut

    def leave(self) -> bool:
        """Note that somebody carries no more; return whether nobody does."""
        self._carriers -= 1
        self.shut()
        if not self._carriers:
            for end in self._ends:
                end.close()
        return not self._carriers


class Wire:
    """Goes between client and server, and can be cut.

    `cut_after(n)` cuts when the server has sent so many more bytes, of which the last does not
    arrive; with `to_server`, when the client has.

    Args:
        url: Where the server is.

    Attributes:
        url: Where clients find it.
        connections: How many there have been.
        cuts: How often it was cut.
    """

    def __init__(self, url: str) -> None:
        self._target: tuple[str, int] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.lead_to(url)
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._left: dict[bool, int] = {}  # to the server or not -> bytes until the cut
        self._held_until = 0.0
        self._threads: list[threading.Thread] = []
        self.connections = 0
        self.cuts = 0
        self._start(self._accept)

    def lead_to(self, url: str | None) -> None:
        """Lead the connections that come to another server, or nowhere: they end at once."""
        target = None if url is None else urlsplit(url)
        if target is None or target.hostname is None or target.port is None:
            self._target = None
            return
        # the daemon checks Host, which names the port that a client sees
        self._ports = f"127.0.0.1:{self._port}".encode(), f"127.0.0.1:{target.port}".encode()
        self._target = (target.hostname, target.port)

    def cut(self) -> None:
        """Cut every connection there is."""
        with self._lock:  # none is closed meanwhile, and its number given to another
            self._left.clear()
            self.cuts += sum(pair.shut() for pair in self._pairs) > 0

    def cut_after(self, nbytes: int, *, to_server: bool = False) -> None:
        """Cut in the middle of what is carried next."""
        with self._lock:
            self._left[to_server] = nbytes

    def hold(self, seconds: float) -> None:
        """Carry nothing to the client for a while, as if it did not read."""
        self._held_until = time.monotonic() + seconds

    def close(self) -> None:
        """Cut all, and wait for the threads."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._held_until = 0.0
        self._threads[0].join()  # from here on there is no new one
        self.cut()
        for thread in self._threads:
            thread.join()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="wire", daemon=True)  # type: ignore[arg-type]
        self._threads = [t for t in self._threads if t.is_alive() or t is self._threads[0]]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._target is None:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                self.connections += 1
                pair = _Pair(client, server)
                with self._lock:
                    self._pairs.append(pair)
                self._start(self._carry, pair, client, server, True)
                self._start(self._carry, pair, server, client, False)

    def _carry(
        self, pair: _Pair, source: socket.socket, sink: socket.socket, to_server: bool
    ) -> None:
        try:
            with suppress(OSError):
                self._carry_all(source, sink, to_server=to_server)
        finally:
            with self._lock:
                if pair.leave():
                    self._pairs.remove(pair)

    def _carry_all(self, source: socket.socket, sink: socket.socket, *, to_server: bool) -> None:
        while data := source.recv(_PIECE):
            if to_server:
                data = data.replace(*self._ports)
            else:
                self._wait()
            allowed = self._allowed(len(data), to_server=to_server)
            sink.sendall(data[:allowed])
            if allowed < len(data):
                self.cut()
                return
        sink.shutdown(socket.SHUT_WR)

    def _wait(self) -> None:
        """Wait while the wire is held."""
        while (left := self._held_until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _allowed(self, nbytes: int, *, to_server: bool) -> int:
        """Return how many of so many bytes are to arrive."""
        with self._lock:
            left = self._left.get(to_server)
            if left is None:
                return nbytes
            self._left[to_server] = left - nbytes
            return nbytes if left > nbytes else max(left - 1, 0)
