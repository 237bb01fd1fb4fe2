"""Values for a sharded model from a state dict that rank 0 alone has in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from splitlearn_core.checkpoint.models.wrappers import plain_name, unwrapped
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.sharded.layout import shares
from splitlearn_core.sharded.meeting import Meeting
from splitlearn_core.sharded.transfer import Run, exchange_runs, hand_out, wires
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from splitlearn_core.sharded.layout import Share

_TIMEOUT = 300.0


def load_full_state(
    model: nn.Module,
    full_state: Mapping[str, torch.Tensor] | None = None,
    *,
    timeout: float = _TIMEOUT,
) -> None:
    """Give a sharded model the values of a whole state dict, which rank 0 has.

    Every rank calls it.  Rank 0 sends each other rank its share, a few MiB at a time; values are
    cast to the model's dtypes.

    Args:
        model: Sharded by `load_sharded`, or by FSDP; changed in place.
        full_state: Rank 0's, by Hugging Face's names; what other ranks give is not looked at.
        timeout: Seconds without a sign of life after which another rank is given up.

    Raises:
        CheckpointError: (a `ValueError`) On rank 0: names are missing or strange, or shapes don't
            fit; names them all.  Nothing was changed.
        RankLostError: (a `RuntimeError`) Another rank died, hangs, or failed.
    """
    meeting = Meeting.of_all("loading a full state", timeout)
    with meeting.attended():
        held = {share.name: share for share in shares(model)}
        flat = {name: share.values for name, share in held.items()}
        flat |= dict(_buffers(model))
        read = None
        if meeting.rank == 0:
            state = _checked(model, held, full_state or {})

            def read(name: str, start: int, out: torch.Tensor) -> None:
                out.copy_(state[name].detach().reshape(-1)[start : start + out.numel()])

        runs = [
            Run(name, held[name].start if name in held else 0, t.numel(), dtype_name(t.dtype))
            for name, t in flat.items()
        ]
        everybody = exchange_runs(meeting, "runs", runs)
        with wires(meeting) as wired:
            hand_out(meeting, wired, everybody, flat, read, lambda _: None)
        meeting.exchange("done", True)


def _checked(
    model: nn.Module, held: Mapping[str, Share], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a state by the names that the model's tensors have here, of tied ones the first."""
    twins = _twins(model)
    shapes = {name: share.shape for name, share in held.items()}
    shapes |= {name: tuple(t.shape) for name, t in _named_buffers(model)}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        found.setdefault(twins.get(name, name), tensor)
    if missing := shapes.keys() - found.keys():
        raise CheckpointError(f"the full state lacks tensors that are needed: {listed(missing)}")
    if strange := found.keys() - shapes.keys():
        raise CheckpointError(
            f"the full state has tensors that the model has no place for: {listed(strange)}"
        )
    wrong = [
        f"{name} is {list(found[name].shape)}, the model's is {list(shape)}"
        for name, shape in shapes.items()
        if tuple(found[name].shape) != tuple(shape)
    ]
    if wrong:
        raise CheckpointError(f"the full state: {'; '.join(wrong[:20])}")
    return found


def _twins(model: nn.Module) -> dict[str, str]:
    """Return the names of tied parameters -> the first of each."""
    firsts: dict[int, str] = {}
    twins: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = _own_name(model, name)
        first = firsts.setdefault(id(parameter), own)
        if first != own:
            twins[own] = first
    return twins


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the persistent buffers, flat."""
    return ((name, buffer.detach().view(-1)) for name, buffer in _named_buffers(model))


def _named_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # noqa: SLF001 - nowhere else told
                yield _own_name(model, f"{path}.{name}" if path else name), buffer


def _own_name(model: nn.Module, name: str) -> str:
    """Return Hugging Face's name of a tensor."""
    plain = plain_name(name)
    return plain.removeprefix("model.") if isinstance(unwrapped(model), SplitModel) else plain
