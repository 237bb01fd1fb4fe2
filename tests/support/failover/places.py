"""Daemons at fixed ports, which can be killed, drained and started again."""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

_SECONDS = 300.0
"""A busy machine takes its time, for imports above all."""


class Places:
    """Daemons with the Trunk of the built-in model, each a process at an address of its own.

    Attributes:
        urls: Their addresses.
    """

    def __init__(self, count: int, log: Path) -> None:
        self._ports = _free_ports(count)
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._pids: dict[int, int] = {}
        self._lines: queue.Queue[str] = queue.Queue()
        self._log = log.open("w")
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "failover.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        """Start all of them."""
        for number in range(len(self.urls)):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        """End all of them."""
        for number in list(self._pids):
            self.kill(number)
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(_SECONDS)
        self._reader.join(_SECONDS)
        if self._nursery.stdout is not None:
            self._nursery.stdout.close()
        self._log.close()

    def start(self, number: int) -> None:
        """Start one, unless it runs, and wait until it is ready."""
        if self.runs(number):
            return
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(f"{self._ports[number]}\n")
        self._nursery.stdin.flush()
        self._pids[number] = int(self._await("forked ").split()[1])
        self._await("splitlearn: ready")

    def runs(self, number: int) -> bool:
        """Whether one is there."""
        pid = self._pids.get(number)
        if pid is None:
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self, number: int) -> None:
        """Kill one, as nobody can refuse."""
        self._signal(number, signal.SIGKILL)

    def drain(self, number: int) -> None:
        """Ask one to end."""
        self._signal(number, signal.SIGTERM)

    def _signal(self, number: int, which: int) -> None:
        """Send a signal, and wait until the process is gone."""
        pid = self._pids.pop(number, None)
        if pid is None:
            return
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                os.kill(pid, which)
                _wait_for(handle)
            finally:
                os.close(handle)

    def _await(self, beginning: str) -> str:
        """Return the next line that begins so."""
        while True:
            line = self._lines.get(timeout=_SECONDS)
            if line.startswith(beginning):
                return line

    def _read(self) -> None:
        assert self._nursery.stdout is not None
        for line in self._nursery.stdout:
            self._lines.put(line)


def _wait_for(handle: int) -> None:
    """Wait until a process has ended; its file descriptor can be read then."""
    if not select.select([handle], [], [], _SECONDS)[0]:
        raise TimeoutError("a daemon did not end")


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
