"""Configurations that commands read, checked as far as that needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitlearn_manager.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig


def read_daemon_config(path: Path, overrides: dict[str, Any]) -> DaemonConfig:
    """Read a configuration, and check all of it that needs no torch.

    Raises:
        ConfigError: Names what is wrong, and where.
    """
    from splitlearn_manager.config.daemon_config import DaemonConfig  # noqa: PLC0415 - slow

    settings = DaemonConfig.from_yaml(path, overrides=overrides)
    check_shapes_of(settings.models, str(path))
    return settings


def check_shapes_of(models: Iterable[ModelConfig], source: str | None) -> None:
    """Check what `config.json` tells of models.

    Raises:
        ConfigError: Has a problem for each model that can't be loaded so.
    """
    from splitlearn_manager.preflight import check_shapes  # noqa: PLC0415 - slow

    check_shapes(models, source)


def choose_model(settings: DaemonConfig, model_id: str | None, source: str) -> ModelConfig:
    """Return one model of a configuration: the one that is named, or the only one.

    Raises:
        ConfigError: There is no such model, or there are several.
    """
    ids = [model.model_id for model in settings.models]
    if model_id is None and len(ids) == 1:
        return settings.models[0]
    if model_id not in ids:
        wanted = "name one with --model" if model_id is None else f"there is no {model_id!r}"
        raise ConfigError(f"{source}: {wanted}; the models are {', '.join(ids) or '(none)'}")
    return settings.models[ids.index(model_id)]
