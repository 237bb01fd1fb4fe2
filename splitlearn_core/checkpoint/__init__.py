"""Weights, adapters and training state on disk: of parts and of whole models.

The names below are imported when first used, so that what needs no torch stays cheap to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.giving import TrainingState
    from splitlearn_core.checkpoint.load import load_weights
    from splitlearn_core.checkpoint.load_report import LoadReport
    from splitlearn_core.checkpoint.minimind import MiniMindName
    from splitlearn_core.checkpoint.parameters import ParameterCounts, count_parameters
    from splitlearn_core.checkpoint.resume import Checkpointer, load_checkpoint, save_checkpoint
    from splitlearn_core.checkpoint.sampler import ResumableSampler
    from splitlearn_core.checkpoint.training_file import TrainingFile, read_training_file
    from splitlearn_core.checkpoint.weights import SavedWeights, save_weights
    from splitlearn_core.checkpoint.world import Batches

__all__ = [
    "Batches",
    "Checkpointer",
    "LoadReport",
    "MiniMindName",
    "ParameterCounts",
    "ResumableSampler",
    "SavedWeights",
    "TrainingFile",
    "TrainingState",
    "count_parameters",
    "load_checkpoint",
    "load_weights",
    "read_training_file",
    "save_checkpoint",
    "save_weights",
]

_HOMES = {
    "Batches": "world",
    "Checkpointer": "resume",
    "LoadReport": "load_report",
    "MiniMindName": "minimind",
    "ParameterCounts": "parameters",
    "ResumableSampler": "sampler",
    "SavedWeights": "weights",
    "TrainingState": "giving",
    "TrainingFile": "training_file",
    "count_parameters": "parameters",
    "load_checkpoint": "resume",
    "load_weights": "load",
    "save_checkpoint": "resume",
    "read_training_file": "training_file",
    "save_weights": "weights",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
