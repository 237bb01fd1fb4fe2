"""What the daemon and its models are told: typed, strict, read from YAML, without torch."""

from __future__ import annotations

from splitlearn_manager.config.daemon_config import DaemonConfig
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.options import PartOptions, PipelineOptions, TrunkLink
from splitlearn_manager.config.server_config import ManagerLimits, ServerConfig

__all__ = [
    "DaemonConfig",
    "ManagerLimits",
    "ModelConfig",
    "PartOptions",
    "PipelineOptions",
    "ServerConfig",
    "TrunkLink",
]
