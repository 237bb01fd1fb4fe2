"""Weights, adapters and training state on disk: of parts and of whole models.

The names below are imported when first used, so that what needs no torch stays cheap to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.adapters.folder import join_adapters
    from splitlearn_core.checkpoint.load import load_weights
    from splitlearn_core.checkpoint.lora import (
        LoraReport,
        active_lora,
        add_lora,
        load_lora,
        lora_disabled,
        lora_names,
        merge_lora,
        remove_lora,
        save_lora,
        set_lora,
    )
    from splitlearn_core.checkpoint.minimind import MiniMindName
    from splitlearn_core.checkpoint.minimind_resume import load_minimind_resume
    from splitlearn_core.checkpoint.models.load_report import LoadReport
    from splitlearn_core.checkpoint.models.parameters import ParameterCounts, count_parameters
    from splitlearn_core.checkpoint.resume import Checkpointer, load_checkpoint, save_checkpoint
    from splitlearn_core.checkpoint.training.giving import TrainingState
    from splitlearn_core.checkpoint.training.sampler import ResumableSampler
    from splitlearn_core.checkpoint.training.world import Batches
    from splitlearn_core.checkpoint.training_file import TrainingFile, read_training_file
    from splitlearn_core.checkpoint.weights import SavedWeights, save_weights

__all__ = [
    "Batches",
    "Checkpointer",
    "LoadReport",
    "LoraReport",
    "MiniMindName",
    "ParameterCounts",
    "ResumableSampler",
    "SavedWeights",
    "TrainingFile",
    "TrainingState",
    "active_lora",
    "add_lora",
    "count_parameters",
    "join_adapters",
    "load_checkpoint",
    "load_lora",
    "load_minimind_resume",
    "load_weights",
    "lora_disabled",
    "lora_names",
    "merge_lora",
    "read_training_file",
    "remove_lora",
    "save_checkpoint",
    "save_lora",
    "save_weights",
    "set_lora",
]

_HOMES = {
    "Batches": "training.world",
    "Checkpointer": "resume",
    "LoadReport": "models.load_report",
    "LoraReport": "lora",
    "MiniMindName": "minimind",
    "ParameterCounts": "models.parameters",
    "ResumableSampler": "training.sampler",
    "SavedWeights": "weights",
    "TrainingFile": "training_file",
    "TrainingState": "training.giving",
    "active_lora": "lora",
    "add_lora": "lora",
    "count_parameters": "models.parameters",
    "join_adapters": "adapters.folder",
    "load_checkpoint": "resume",
    "load_minimind_resume": "minimind_resume",
    "load_lora": "lora",
    "load_weights": "load",
    "lora_disabled": "lora",
    "lora_names": "lora",
    "merge_lora": "lora",
    "read_training_file": "training_file",
    "remove_lora": "lora",
    "save_checkpoint": "resume",
    "save_lora": "lora",
    "save_weights": "weights",
    "set_lora": "lora",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
