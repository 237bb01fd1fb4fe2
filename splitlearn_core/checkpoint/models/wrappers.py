"""What people wrap models in: DDP, FSDP, `torch.compile`; and the model within."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from splitlearn_core.checkpoint.models.plain_names import plain_name as plain_name  # noqa: PLC0414

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.fsdp import FullyShardedDataParallel

# Where `torch.compile` keeps the module within.
_COMPILED = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that DDP, FSDP1, `DataParallel` and `torch.compile` were given.

    They may lie around one another in any order.
    """
    while True:
        if isinstance(compiled := getattr(model, _COMPILED, None), nn.Module):
            model = compiled
        elif _is_parallel(model) and isinstance(within := model.module, nn.Module):
            model = within
        else:
            return model


def fsdp1_modules(model: nn.Module) -> list[FullyShardedDataParallel]:
    """Return the modules that FSDP1 wraps, `model` itself among them."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel as Wrapped  # noqa: PLC0415 - slow

    return [module for module in model.modules() if isinstance(module, Wrapped)]


def parameters_of(model: nn.Module) -> Iterator[tuple[int, bool]]:
    """Yield the number of values of each parameter of the whole model, and whether it is trained.

    One that is used twice comes once.  Of one that is sharded over ranks, all values count: FSDP2
    tells that itself, FSDP1 in the flat parameters that it makes of many.
    """
    sharded: set[int] = set()
    for wrapped in fsdp1_modules(model):
        handle = wrapped._handle  # noqa: SLF001 - nowhere else does it tell
        if handle is not None:
            flat = handle.flat_param
            sharded |= {id(flat), *map(id, getattr(flat, "_params", None) or ())}
            yield from _flat_values(flat)
    for parameter in model.parameters():
        if id(parameter) not in sharded:
            yield parameter.numel(), parameter.requires_grad


def _flat_values(flat: torch.nn.Parameter) -> Iterator[tuple[int, bool]]:
    """Yield the parameters that a flat one of FSDP1 was made of."""
    originals = getattr(flat, "_params", None)
    for number, shape in enumerate(flat._shapes):  # type: ignore[attr-defined]  # noqa: SLF001
        one = flat if originals is None else originals[number]
        yield shape.numel(), one.requires_grad


def _is_parallel(model: nn.Module) -> bool:
    """Whether a module is a parallel wrapper, and not one that happens to have a `module`."""
    kinds: tuple[type[nn.Module], ...] = (nn.DataParallel,)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel as Sharded  # noqa: PLC0415
        from torch.nn.parallel import DistributedDataParallel as Copied  # noqa: PLC0415

        kinds = (*kinds, Copied, Sharded)
    return isinstance(model, kinds)
