"""What systemd is told, where it started the daemon: sd_notify(3), over a datagram socket.

Nothing here fails for the daemon: a socket that can't be reached is logged once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

logger = logging.getLogger(__name__)


class Notifier:
    """Tells the service manager what becomes of the daemon; silent where there is none.

    Args:
        environ: Where `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` are looked for.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.watchdog_seconds = _watchdog_seconds(environ)

    def ready(self, status: str) -> None:
        """Say that connections are accepted, or that a reload of the configuration has ended."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Say in one line what the daemon is at."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the configuration is being read again; `ready` follows."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}", "STATUS=reading the configuration")

    def stopping(self) -> None:
        """Say that the daemon drains and ends."""
        self._send("STOPPING=1", "STATUS=draining")

    def alive(self) -> None:
        """Say that the daemon is not stuck."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        """Send one datagram."""
        if not self._address:
            return
        try:
            address = _socket_address(self._address)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except (OSError, ValueError) as error:
            logger.warning("cannot tell systemd over %r: %s", self._address, error)
            self._address = ""


async def keep_watchdog(notifier: Notifier, check: Callable[[float], Awaitable[None]]) -> None:
    """Tell systemd for ever that the daemon is alive, each time after it has shown that it is.

    Args:
        notifier: Who tells; returns at once if nobody watches.
        check: Returns if the manager can decide things, within so many seconds; else a
            `TimeoutError`.
    """
    if notifier.watchdog_seconds is None:
        return
    pause = notifier.watchdog_seconds / 2
    while True:
        try:
            await check(pause)
        except TimeoutError:
            logger.critical("the manager has decided nothing for %g s; it is stuck", pause)
        else:
            notifier.alive()
        await asyncio.sleep(pause)


def _socket_address(name: str) -> str | bytes:
    """Return the address of a notify socket: a path, or a name that is in no file system."""
    if name.startswith("@"):
        return b"\0" + name[1:].encode()
    if name.startswith("/"):
        return name
    raise ValueError("it is neither a path nor an abstract name")


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Return after how many seconds of silence systemd acts; `None` if it does not watch us."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or pid not in {"", str(os.getpid())}:
        return None
    return int(usec) / 1e6
