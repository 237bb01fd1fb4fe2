"""Settings from the environment, and how layers of settings lie over each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from splitlearn_manager.config.section import Findings, config_error, field_names
from splitlearn_manager.config.server_config import ManagerLimits, ServerConfig
from splitlearn_manager.errors import ConfigError, KeyPath, Problem

logger = logging.getLogger(__name__)

PREFIX = "SPLITLEARN"
SECTIONS: dict[str, type[ServerConfig | ManagerLimits]] = {
    "server": ServerConfig,
    "manager": ManagerLimits,
}
"""The sections whose keys the environment and the command line can set."""

Settings = Mapping[str, Any]
"""Nested mappings with the shape of the YAML: `{"server": {"port": 0}}`."""


def variable(path: KeyPath) -> str:
    """Return `SPLITLEARN_SERVER_PORT` for `("server", "port")`."""
    return "_".join((PREFIX, *map(str, path))).upper()


def environment_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that variables such as `SPLITLEARN_SERVER_PORT` hold.

    Each one that is used is logged by name, so that none widens what is granted in silence.

    Raises:
        ConfigError: A variable has a section's prefix, but no setting has its name, or the value
            is not of the setting's type.
    """
    findings = Findings()
    settings: dict[str, Any] = {}
    for section in SECTIONS:
        prefix = variable((section, ""))
        for name in sorted(name for name in environ if name.startswith(prefix)):
            with findings.at():
                key, value = _parse(section, name.removeprefix(prefix).lower(), environ[name])
                settings.setdefault(section, {})[key] = value
                logger.info("%s.%s is set by the environment (%s)", section, key, name)
    findings.raise_if_any()
    return settings


def merge(base: Settings, over: Settings) -> dict[str, Any]:
    """Return `base` with the values of `over` put over it, section by section.

    A section that is no mapping in `base` stays as it is, so that validation tells of it.
    """
    merged = dict(base)
    for key, value in over.items():
        below = {} if merged.get(key) is None else merged[key]
        if not isinstance(value, Mapping):
            merged[key] = value
        elif isinstance(below, Mapping):
            merged[key] = merge(below, value)
    return merged


def holds(settings: Settings, path: KeyPath) -> bool:
    """Whether a layer sets the value at a path."""
    value: Any = settings
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return bool(path)


def _parse(section: str, key: str, text: str) -> tuple[str, Any]:
    """Return one setting with its text read as the setting's type."""
    kind = SECTIONS[section]
    try:
        return key, getattr(TypeAdapter(kind).validate_strings({key: text}), key)
    except ValidationError as error:
        problems = config_error(error, field_names(kind)).problems
        source = variable((section, key))
        raise ConfigError(*(Problem(p.message, source=source) for p in problems)) from None
