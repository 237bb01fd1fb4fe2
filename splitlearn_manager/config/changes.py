"""What differs between two configurations of a daemon that runs: pure, values in and out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from splitlearn_manager.config.section import field_names

if TYPE_CHECKING:
    from splitlearn_manager.config.daemon_config import DaemonConfig
    from splitlearn_manager.config.model_config import ModelConfig

LIMITS = (
    "max_models",
    "memory_limit",
    "eviction",
    "load_attempts",
    "load_stall_timeout",
    "memory_wait",
)
"""Keys of `manager:` that hold from the next load on; the others need a new start."""

SERVER_KEYS = ("log_level",)
"""Likewise of `server:`."""


@dataclass(frozen=True)
class ConfigChanges:
    """What a newer configuration asks for.

    Attributes:
        added: Models that the older one does not name.
        removed: Ids of models that the newer one does not name.
        changed: Models that must be loaded again, as the newer one has them.
        adjusted: Models that differ only in what needs no load, likewise.
        unchanged: Models that are the same.
        limits: Keys of `manager:` that differ, and can change while the daemon runs.
        server: Keys of `server:`, likewise.
        fixed: Full names of keys that differ, and can't.
    """

    added: tuple[ModelConfig, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[ModelConfig, ...] = ()
    adjusted: tuple[ModelConfig, ...] = ()
    unchanged: tuple[ModelConfig, ...] = ()
    limits: tuple[str, ...] = ()
    server: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line that names all of it."""
        named = {
            "added": [model.model_id for model in self.added],
            "removed": self.removed,
            "to be loaded again": [model.model_id for model in self.changed],
            "adjusted": [model.model_id for model in self.adjusted],
            "limits": self.limits,
            "server": self.server,
        }
        told = [f"{what}: {', '.join(names)}" for what, names in named.items() if names]
        return "; ".join(told) or "nothing that can change while the daemon runs"


def compare(old: DaemonConfig, new: DaemonConfig) -> ConfigChanges:
    """Return what differs between the configuration in force and a newer one."""
    before = {model.model_id: model for model in old.models}
    after = {model.model_id: model for model in new.models}
    both = [model for name, model in after.items() if name in before]
    differ = [model for model in both if model != before[model.model_id]]
    same_load = [model for model in differ if model.loads_like(before[model.model_id])]
    limits, server = _differing(old.manager, new.manager), _differing(old.server, new.server)
    return ConfigChanges(
        added=tuple(model for name, model in after.items() if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(model for model in differ if model not in same_load),
        adjusted=tuple(same_load),
        unchanged=tuple(model for model in both if model not in differ),
        limits=tuple(key for key in limits if key in LIMITS),
        server=tuple(key for key in server if key in SERVER_KEYS),
        fixed=(
            *(f"server.{key}" for key in server if key not in SERVER_KEYS),
            *(f"manager.{key}" for key in limits if key not in LIMITS),
        ),
    )


def in_force(old: DaemonConfig, new: DaemonConfig) -> DaemonConfig:
    """Return the newer configuration, with what can't change as the older one has it."""
    return replace(
        new,
        server=replace(old.server, **_values(new.server, SERVER_KEYS)),
        manager=replace(old.manager, **_values(new.manager, LIMITS)),
    )


def _differing(old: object, new: object) -> list[str]:
    """Return the keys in which two sections differ."""
    names = field_names(type(old))
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _values(section: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(section, name) for name in names}
