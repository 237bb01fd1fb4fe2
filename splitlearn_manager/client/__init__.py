"""Parts that live elsewhere, and models that are made of them.

The names below are imported when first used, so that reading a configuration does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_manager.client.connected_model import connect
    from splitlearn_manager.client.errors import (
        RemoteError,
        RemoteSessionClosed,
        RemoteUnavailable,
    )
    from splitlearn_manager.client.healing import Healed
    from splitlearn_manager.client.remote import RemoteTrunk
    from splitlearn_manager.client.remote_cache import RemoteCache, RemoteStep
    from splitlearn_manager.client.timings import Timings
    from splitlearn_manager.config.retry import RetryPolicy

__all__ = [
    "Healed",
    "RemoteCache",
    "RemoteError",
    "RemoteSessionClosed",
    "RemoteStep",
    "RemoteTrunk",
    "RemoteUnavailable",
    "RetryPolicy",
    "Timings",
    "connect",
]

_HOMES = {
    "Healed": "client.healing",
    "RemoteCache": "client.remote_cache",
    "RemoteError": "client.errors",
    "RemoteSessionClosed": "client.errors",
    "RemoteStep": "client.remote_cache",
    "RemoteTrunk": "client.remote",
    "RemoteUnavailable": "client.errors",
    "RetryPolicy": "config.retry",
    "Timings": "client.timings",
    "connect": "client.connected_model",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"splitlearn_manager.{_HOMES[name]}"), name)
