"""Bearer tokens: named in a configuration, never written in one."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

_MAX_TOKEN = 4096
"""Characters; servers read no longer headers anyway."""


def check_token_source(token_file: str | None, token_env: str | None) -> None:
    """Refuse two sources for one token.

    Raises:
        ConfigError: Both are given.
    """
    if token_file is not None and token_env is not None:
        raise ConfigError(Problem("give token_file or token_env, not both", ("token_env",)))


def read_token(
    token_file: str | None, token_env: str | None, environ: Mapping[str, str] | None = None
) -> str | None:
    """Return the token that a configuration names, or `None` where it names none.

    A file's surrounding white space is dropped; one that other users can read is warned about.

    Raises:
        ConfigError: The file or variable is not there, is empty or too long, or holds more than one
            word.
    """
    check_token_source(token_file, token_env)
    if token_file is not None:
        return _checked(_read_file(token_file), "token_file", f"the file {token_file}")
    if token_env is not None:
        value = (os.environ if environ is None else environ).get(token_env, "")
        return _checked(value, "token_env", f"the environment variable {token_env}")
    return None


def _checked(text: str, key: str, origin: str) -> str:
    """Return the one word that a token is; the message never shows it."""
    if len(text) > _MAX_TOKEN:
        message = f"{origin} holds more than the {_MAX_TOKEN} characters that a token may have"
        raise ConfigError(Problem(message, (key,)))
    token = text.strip()
    if not is_token(token):
        raise ConfigError(Problem(f"{origin} must hold one token of printable ASCII", (key,)))
    return token


def is_token(text: str) -> bool:
    """Whether a text is one word of printable ASCII, which a header can carry."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _read_file(name: str) -> str:
    """Return what a token file holds."""
    try:
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - raises nothing of its own
        with path.open(encoding="utf-8", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
                logger.warning("other users can read the token in %s; chmod 600 it", name)
            return file.read(_MAX_TOKEN + 1)
    except OSError as error:
        problem = Problem(f"cannot read {name}: {error.strerror or error}", ("token_file",))
        raise ConfigError(problem) from None
