"""Split Hugging Face decoders into Bottom, Trunk and Top; load, save and run any part.

A pure library: no asyncio, no threads that outlive a call, no process-wide settings.
The names below are imported when first used, so that the modules without torch
(`plan`, `shape`, `families`) stay cheap to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.causal_lm import SplitCausalLM
    from splitlearn_core.errors import CheckpointError, SplitLearnError
    from splitlearn_core.factory import ModelFactory
    from splitlearn_core.hidden_state import HiddenState
    from splitlearn_core.plan import ComponentSpec, SplitPlan
    from splitlearn_core.registry import ModelRegistry
    from splitlearn_core.split_model import SplitModel

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ComponentSpec",
    "HiddenState",
    "ModelFactory",
    "ModelRegistry",
    "SplitCausalLM",
    "SplitLearnError",
    "SplitModel",
    "SplitPlan",
    "__version__",
]

_HOMES = {
    "CheckpointError": "errors",
    "ComponentSpec": "plan",
    "ModelFactory": "factory",
    "ModelRegistry": "registry",
    "SplitCausalLM": "causal_lm",
    "SplitLearnError": "errors",
    "HiddenState": "hidden_state",
    "SplitModel": "split_model",
    "SplitPlan": "plan",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
