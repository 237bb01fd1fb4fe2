"""A model whose weights are shared out over ranks, and its optimizer, within a checkpoint.

They lie in a folder of `torch.distributed.checkpoint` (DCP), into which every rank writes its own
share, and from which any number of ranks reads its own, optimizer's state included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitlearn_core.checkpoint.models.wrappers import fsdp1_modules

FOLDER = "sharded"
"""Of a checkpoint, for DCP."""

MODEL, OPTIMIZER = "model", "optimizer"
_NAMES = (MODEL, OPTIMIZER)


def is_sharded(model: object) -> bool:
    """Whether FSDP1 or FSDP2 has shared out a model's weights."""
    if not isinstance(model, nn.Module) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow

    return any(isinstance(p, DTensor) for p in model.parameters()) or bool(fsdp1_modules(model))


def sharded_names(things: Mapping[str, Any]) -> frozenset[str]:
    """Return which things are saved as shards: the model and its optimizer, or nothing."""
    if not is_sharded(things.get(MODEL)):
        return frozenset()
    return frozenset(name for name in _NAMES if name in things)


def write(folder: Path, things: Mapping[str, Any]) -> None:
    """Write this rank's shares; every rank does at once.

    Raises:
        StorageError: (an `OSError`) They can't be written.
    """
    from splitlearn_core.sharded import save_dcp  # noqa: PLC0415 - slow

    save_dcp(folder / FOLDER, things[MODEL], things.get(OPTIMIZER))


def read(folder: Path, things: Mapping[str, Any]) -> None:
    """Give the model and its optimizer their state; every rank does at once.

    The model need not be sharded, nor the number of ranks be the one that wrote.

    Raises:
        CheckpointError: (a `ValueError`) It does not fit; nothing is changed then.
    """
    from splitlearn_core.sharded import load_dcp  # noqa: PLC0415 - slow

    load_dcp(folder / FOLDER, things[MODEL], things.get(OPTIMIZER))
