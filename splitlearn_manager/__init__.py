"""Keep parts of models alive inside an asyncio service, and serve them.

The names below are imported when first used, so that configurations and their errors don't wait
for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.config.server_config import ServerConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.model_info import ModelInfo
    from splitlearn_manager.core.model_loader import ModelLoader
    from splitlearn_manager.core.resources import ResourceManager
    from splitlearn_manager.core.states import ModelStatus

__all__ = [
    "AsyncManagedModel",
    "AsyncModelManager",
    "ModelConfig",
    "ModelInfo",
    "ModelLoader",
    "ModelStatus",
    "ResourceManager",
    "ServerConfig",
]

_HOMES = {
    "AsyncManagedModel": "core.entries",
    "AsyncModelManager": "core.async_model_manager",
    "ModelConfig": "config.model_config",
    "ModelInfo": "core.model_info",
    "ModelLoader": "core.model_loader",
    "ModelStatus": "core.states",
    "ResourceManager": "core.resources",
    "ServerConfig": "config.server_config",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
