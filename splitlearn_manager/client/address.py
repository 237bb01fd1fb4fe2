"""Where a daemon is, and what it says about its models."""

from __future__ import annotations

import json
import math
import ssl
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from splitlearn_manager.client.errors import RemoteError, RemoteUnavailable
from splitlearn_manager.config.secrets import is_token
from splitlearn_manager.trace_context import trace_headers

_PORTS = {"http": 80, "https": 443}
_MAX_BODY = 1 << 20
_UNAVAILABLE = frozenset({408, 429, 502, 503, 504})
_CODES = {
    401: "unauthorized",
    403: "forbidden",
    404: "model_not_found",
    500: "internal",
    507: "insufficient_resources",
}


@dataclass(frozen=True)
class Address:
    """A daemon: `http://host:8000`, or `https://…` where it, or a proxy before it, speaks TLS.

    Requests go straight to that host: proxies of the environment are not asked, and redirects are
    not followed, so that hidden states go where the configuration says, or nowhere.

    Attributes:
        scheme: `http` or `https`.
        host: Name or address, without brackets.
        port: Its port.
        prefix: What stands before `/v2`, for a daemon behind a proxy; `""` usually.
        token: The bearer token, or `None`.
        ca_file: PEM file with the certificates that the server's must rest on, instead of those
            that the system trusts (or `$SSL_CERT_FILE`).
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    token: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    @classmethod
    def parse(cls, url: str, token: str | None = None, ca_file: str | None = None) -> Address:
        """Return the address that a URL is.

        Raises:
            ValueError: It is none, or has parts that an address has not; the token is none; or
                there are no certificates in `ca_file`, or nothing to use them for.
        """
        _check_token(token)
        try:
            parts = urlsplit(url)
            port = parts.port
            (parts.hostname or "").encode("idna")  # a name that DNS can have
        except ValueError as error:
            raise ValueError(f"{url!r} is no address: {error}") from None
        if parts.scheme not in _PORTS or not parts.hostname or port == 0:
            raise ValueError(f"{url!r} is no address such as http://host:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(f"{url!r} must have nothing but a host, a port and a path")
        prefix = parts.path.rstrip("/")
        port = port or _PORTS[parts.scheme]
        address = cls(parts.scheme, parts.hostname, port, prefix, token, ca_file)
        if ca_file is not None:
            address.check_certificates(ca_file)
        return address

    def __str__(self) -> str:
        """Return the URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries: the token, and the span that it is sent from."""
        token = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        return {**token, **trace_headers()}

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """How to make sure of the server, or `None` for plain HTTP."""
        if self.scheme != "https":
            return None
        return ssl.create_default_context(
            cafile=None if self.ca_file is None else Path(self.ca_file).expanduser()
        )

    def check_certificates(self, ca_file: str) -> None:
        """Read the certificates that the server's must rest on.

        Raises:
            ValueError: There are none, or the address has no use for them.
        """
        if self.scheme != "https":
            raise ValueError(f"{self} is not https, and has no use for the ca_file {ca_file}")
        try:
            self.tls  # noqa: B018 - it is kept
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"no certificates can be read from {ca_file}: {reason}") from None

    def sessions_url(self, model_id: str) -> str:
        """Return where a model's sessions are."""
        path = model_path(model_id)
        return f"{str(self).replace('http', 'ws', 1)}{path}/sessions"

    def get_json(self, path: str, timeout: float) -> Any:
        """Return what a path answers.

        Raises:
            RemoteError: It answers with an error, or not with JSON.
            RemoteUnavailable: It can't be reached, or not now.
        """
        try:
            with closing(self.connection(timeout)) as connection:
                connection.request("GET", self.prefix + path, headers=self.headers)
                with connection.getresponse() as response:
                    status, body = response.status, response.read(_MAX_BODY)
                    left = response.length if len(body) < _MAX_BODY else 0
                wait = seconds_to_wait(response.headers.get("Retry-After"))
        except (OSError, HTTPException) as error:
            raise self.unreachable(error) from error
        if status != HTTPStatus.OK:
            raise self.refusal(status, body, wait)
        if left or not body:  # nothing at all: its headers may have been cut off, too
            raise self.unreachable(IncompleteRead(body, left))
        try:
            return json.loads(body)
        except ValueError:
            raise RemoteError(f"{self}{path} did not answer with JSON", "bad_answer") from None

    def connection(self, timeout: float | None) -> HTTPConnection:
        """Return a connection that is opened by its first request."""
        if self.scheme == "http":
            return HTTPConnection(self.host, self.port, timeout=timeout)
        return HTTPSConnection(self.host, self.port, timeout=timeout, context=self.tls)

    def unreachable(self, error: Exception) -> RemoteUnavailable:
        """Return what to raise where the connection fails."""
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        code = "certificate" if isinstance(error, ssl.SSLCertVerificationError) else "unreachable"
        return RemoteUnavailable(f"cannot reach {self}: {reason}", code)

    def refusal(
        self, status: int, body: bytes | bytearray, retry_after: float | None = None
    ) -> RemoteError | RemoteUnavailable:
        """Return what to raise for an HTTP status that is an error."""
        message = f"{self} answered {status}: {_error_text(body)}"
        if status in _UNAVAILABLE:
            return RemoteUnavailable(message, "unavailable", retry_after)
        return RemoteError(message, _CODES.get(status, "bad_request"))


def _check_token(token: str | None) -> None:
    """Refuse what can't stand in a header, without showing it.

    Raises:
        ValueError: It is empty, or more than one word of printable ASCII.
    """
    if token is not None and not is_token(token):
        raise ValueError(
            f"the token ({len(token)} characters) must be one word of printable ASCII, without"
            " spaces or line ends"
        )


def model_path(model_id: str) -> str:
    """Return the path of a model."""
    return f"/v2/models/{quote(model_id, safe='')}"


def seconds_to_wait(value: Any) -> float | None:
    """Return the seconds that a `Retry-After` says; a date (RFC 9110) is not read."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _error_text(body: bytes | bytearray) -> str:
    """Return the text of an error, or what that it is none tells."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return "no error of a SplitLearn daemon; is there another server at this address?"
