"""The socket that the daemon listens on, taken before anything else is started."""

from __future__ import annotations

import socket

from splitlearn_manager.errors import ConfigError, Problem

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; connections wait until they are accepted.

    Args:
        host: Name or address; an IPv6 address with or without brackets.
        port: 0 takes any free one.

    Raises:
        ConfigError: The address can't be had: it is another's, not this machine's, or unknown.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return _bind(socket.socket(family, kind, protocol), address)
    except (OSError, UnicodeError) as error:  # the latter: a name that DNS can't have
        message = f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(Problem(message, ("server", "port"))) from None


def _bind(sock: socket.socket, address: object) -> socket.socket:
    """Let a socket listen, or close it."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)  # type: ignore[arg-type]  # getaddrinfo's own form
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the address that clients on this machine use."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
