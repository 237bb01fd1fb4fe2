"""Tools around parts: shards, parameter names, memory, storage, threads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.utils.memory import MemorySnapshot, MemoryTracker
    from splitlearn_core.utils.param_mapper import ParamMapper
    from splitlearn_core.utils.shard_loader import ShardLoader
    from splitlearn_core.utils.storage import StorageManager

__all__ = ["MemorySnapshot", "MemoryTracker", "ParamMapper", "ShardLoader", "StorageManager"]

_HOMES = {
    "MemorySnapshot": "memory",
    "MemoryTracker": "memory",
    "ParamMapper": "param_mapper",
    "ShardLoader": "shard_loader",
    "StorageManager": "storage",
}


def __getattr__(name: str) -> Any:
    """Import a tool from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
