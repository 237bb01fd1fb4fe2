"""`DaemonConfig`: a daemon's whole YAML, with what environment and command line change in it.

Command line over environment over file over default.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from splitlearn_manager.config.environment import (
    SECTIONS,
    Settings,
    environment_settings,
    holds,
    merge,
    variable,
)
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.section import Findings, build, found, unknown_key
from splitlearn_manager.config.server_config import ManagerLimits, ServerConfig
from splitlearn_manager.config.yaml_file import Document, read_yaml
from splitlearn_manager.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEYS = (*SECTIONS, "models")


@dataclass(frozen=True)
class DaemonConfig:
    """All that a daemon is told.

    Attributes:
        server: How it listens, and what it grants.
        manager: What it may hold.
        models: What it loads at start.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    manager: ManagerLimits = field(default_factory=ManagerLimits)
    models: tuple[ModelConfig, ...] = ()

    @classmethod
    def from_yaml(
        cls,
        path: str | os.PathLike[str],
        *,
        environ: Mapping[str, str] | None = None,
        overrides: Settings | None = None,
    ) -> Self:
        """Read and validate a daemon's YAML.

        Args:
            path: The file.
            environ: Where `SPLITLEARN_SERVER_PORT=0` and its like are looked for; the process'
                own environment by default.
            overrides: What the command line says: `{"server": {"port": 0}}`.

        Raises:
            ConfigError: Has a problem for each wrong value, with file and line (or the variable's
                name), key, what was found and what was expected.
        """
        layers = _Layers(
            read_yaml(path),
            environment_settings(os.environ if environ is None else environ),
            overrides or {},
        )
        try:
            return cls.from_dict(layers.merged())
        except ConfigError as error:
            raise ConfigError(*map(layers.locate, error.problems)) from None

    @classmethod
    def from_dict(cls, data: Settings) -> Self:
        """Return the validated configuration that nested mappings hold.

        Raises:
            ConfigError: Has a problem for each wrong value, with its key.
        """
        findings = Findings()
        for key in data:
            if key not in _KEYS:
                findings.add(Problem(unknown_key(key, _KEYS), (key,)))
        server, manager = ServerConfig(), ManagerLimits()
        with findings.at("server"):
            server = ServerConfig.from_dict(data.get("server"))
        with findings.at("manager"):
            manager = build(ManagerLimits, data.get("manager"))
        models = _models(data.get("models"), findings)
        findings.raise_if_any()
        return cls(server, manager, models)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, which `from_dict` takes."""
        return asdict(self)


@dataclass(frozen=True)
class _Layers:
    """Where settings come from, the last first."""

    document: Document
    environment: Settings
    command_line: Settings

    def merged(self) -> dict[str, Any]:
        """Return what holds."""
        return merge(merge(self.document.data, self.environment), self.command_line)

    def locate(self, problem: Problem) -> Problem:
        """Return a problem with the place of the value that it is about."""
        if holds(self.command_line, problem.path):
            return replace(problem, source="command line")
        if holds(self.environment, problem.path):
            return replace(problem, source=variable(problem.path))
        return self.document.locate(problem)


def _models(items: Any, findings: Findings) -> tuple[ModelConfig, ...]:
    """Return the configurations of a list of models, whose ids must differ."""
    if items is not None and not isinstance(items, list | tuple):
        findings.add(Problem(f"must be a list of models, {found(items)}", ("models",)))
        return ()
    models: dict[str, ModelConfig] = {}
    for number, item in enumerate(items or ()):
        with findings.at("models", number):
            model = ModelConfig.from_dict(item)
            if model.model_id in models:
                message = f"stands here twice, {found(model.model_id)}"
                raise ConfigError(Problem(message, ("model_id",)))
            models[model.model_id] = model
    return tuple(models.values())
