"""Who may ask for what: one middleware that refuses whatever it was not told to let in.

It decides on the path that is routed (`scope["path"]`), never on a URL put together from headers,
and for WebSockets as for requests.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from splitlearn_manager.errors import ConfigError, Problem
from splitlearn_manager.server.responses import error_response, refuse_websocket

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from splitlearn_manager.config import ServerConfig

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
"""What answers without a token: probes have none."""

HTTP_PORT = 80
HTTPS_PORT = 443
"""The ports that clients leave out of `Host`."""

IPV6_NETWORK = 64
"""Bits of an IPv6 address that tell whose it is: the rest is its owner's to choose."""

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


CLIENT = "client"
"""Where a scope's state has who sent the request."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not let in.

    Attributes:
        status: HTTP status.
        message: What was wrong, and what would be right.
        headers: What the status asks for.
    """

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AccessPolicy:
    """What a request has to show.

    Attributes:
        token: The bearer token, or `None` where there is none for all.
        clients: Tokens of clients that have their own, by their names.  Where there are neither,
            none is asked for.
        hosts: Values that `Host` may have, or `None` for any.  A daemon on loopback checks it,
            because a web page can let its own name point to 127.0.0.1, and so have the browser
            send requests here that look as if they came from the page's own server.
    """

    token: str | None = field(default=None, repr=False)
    clients: Mapping[str, str] = field(default_factory=dict, repr=False)
    hosts: frozenset[str] | None = None

    @classmethod
    def of(cls, config: ServerConfig, port: int) -> AccessPolicy:
        """Return the policy of a daemon that listens on `port`.

        Raises:
            ConfigError: The token is named but not there, or the network can reach the port and
                there is none.
        """
        token, clients = config.read_token(), config.read_client_tokens()
        if token is None and not clients and not config.is_loopback:
            message = f"listening on {config.host} needs a token: set token_file or token_env"
            raise ConfigError(Problem(message, ("server", "host")))
        if token in clients.values():
            message = "a client has the same token as token_file or token_env"
            raise ConfigError(Problem(message, ("server", "tokens")))
        usual = HTTPS_PORT if config.tls_cert_file else HTTP_PORT
        hosts = loopback_hosts(config.host, port, usual) if config.is_loopback else None
        return cls(token, clients, hosts)

    def judge(self, scope: Scope) -> Refusal | None:
        """Return why a request or WebSocket is refused, or `None`."""
        headers = Headers(scope=scope)
        return (
            self._judge_host(headers)
            or self._judge_origin(headers)
            or self._judge_token(scope["path"], headers)
        )

    def client_of(self, scope: Scope) -> str:
        """Return who sends a request that was let in: a client's name, or else its address."""
        given = _bearer(Headers(scope=scope))
        for name, token in self.clients.items():
            if _same(given, token):
                return name
        return address_of(scope)

    def _judge_host(self, headers: Headers) -> Refusal | None:
        """Refuse a name that this daemon does not have."""
        given = headers.getlist("host")
        if self.hosts is None or (len(given) == 1 and given[0].lower() in self.hosts):
            return None
        return Refusal(403, f"Host must be one of {', '.join(sorted(self.hosts))}")

    def _judge_origin(self, headers: Headers) -> Refusal | None:
        """Refuse pages of other sites: a browser lets them open WebSockets to anywhere."""
        origin = headers.get("origin")
        if origin is None or _netloc(origin) == headers.get("host", "").lower():
            return None
        return Refusal(403, "pages of other origins may not use this server")

    def _judge_token(self, path: str, headers: Headers) -> Refusal | None:
        """Refuse a missing or wrong token, in a time that does not tell how wrong it is."""
        asked = [*self.clients.values(), *([] if self.token is None else [self.token])]
        if not asked or path in OPEN_PATHS:
            return None
        given = _bearer(headers)
        right = [_same(given, token) for token in asked]  # each is compared, always
        if any(right):
            return None
        message = "a bearer token is needed: Authorization: Bearer <token>"
        return Refusal(401, message, {"WWW-Authenticate": "Bearer"})


def _bearer(headers: Headers) -> str:
    """Return the bearer token that a request shows, or an empty one, which is nobody's."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, token: str) -> bool:
    """Whether two tokens are the same, in a time that does not tell how far they are."""
    return hmac.compare_digest(given.encode(), token.encode())


def address_of(scope: Scope) -> str:
    """Return the address that a request comes from: of IPv6 the network, of a socket `local`."""
    host = (scope.get("client") or ("local", 0))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return str(host)
    if address.version == 4:  # noqa: PLR2004 - IPv4
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_NETWORK), strict=False))


def _netloc(origin: str) -> str | None:
    """Return host and port of an origin, or `None` if it is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # brackets around what is no IPv6 address
        return None


def loopback_hosts(host: str, port: int, usual: int = HTTP_PORT) -> frozenset[str]:
    """Return the values of `Host` that reach this machine's own port, given the bound address.

    Args:
        host: The bound address.
        port: The bound port.
        usual: The port that clients leave out.
    """
    bound = f"[{host}]" if ":" in host and not host.startswith("[") else host.lower()
    names = {*LOOPBACK_NAMES, bound}
    with_port = {f"{name}:{port}" for name in names}
    return frozenset(names | with_port if port == usual else with_port)


class SecurityMiddleware:
    """Lets in what the policy lets in; everything else is answered here."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge one request or WebSocket."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        refusal = self.policy.judge(scope)
        if refusal is None:
            scope.setdefault("state", {})[CLIENT] = self.policy.client_of(scope)
            await self.app(scope, receive, send)
            return
        response = error_response(scope["path"], refusal.status, refusal.message, refusal.headers)
        if scope["type"] == "websocket":
            await refuse_websocket(response, scope, receive, send)
        else:
            await response(scope, receive, send)
