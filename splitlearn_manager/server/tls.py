"""TLS, as the daemon speaks it: with the certificate and key that it was given."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

from splitlearn_manager.errors import ConfigError, Problem


def server_context(cert_file: str | None, key_file: str | None) -> ssl.SSLContext | None:
    """Return how to serve TLS (1.2 and later), or `None` where no files are named.

    Raises:
        ConfigError: A file can't be read, is no PEM, or the key is another certificate's, or has a
            password.
    """
    if cert_file is None or key_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    cert, key = _readable(cert_file, "tls_cert_file"), _readable(key_file, "tls_key_file")
    try:
        context.load_cert_chain(cert, key, _refuse_password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        message = f"no certificate in {cert_file} with its key in {key_file}: {reason}"
        raise ConfigError(Problem(message, ("server", "tls_cert_file"))) from None
    return context


def _readable(name: str, key: str) -> Path:
    """Return the path of a file that can be read."""
    try:
        path = Path(name).expanduser()
        with path.open("rb"):
            return path
    except (OSError, RuntimeError) as error:
        message = f"cannot read {name}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(Problem(message, ("server", key))) from None


def _refuse_password() -> NoReturn:
    """Ask nobody: a daemon has no terminal."""
    raise ValueError("the key has a password; give one without, that only the daemon can read")
