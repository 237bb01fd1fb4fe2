"""Putting the tensors of a sharded model together on rank 0, one after the other.

No other rank ever holds more than its own share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from splitlearn_core.checkpoint.models.wrappers import fsdp1_modules
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError
from splitlearn_core.sharded.layout import Share, shares
from splitlearn_core.sharded.meeting import Meeting
from splitlearn_core.sharded.transfer import Run, exchange_runs, take_in, wires

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_core.sharded.transfer import Wires

_TIMEOUT = 300.0


class Gathering:
    """The parameters of a sharded model, as they can be read whole.

    Attributes:
        shapes: Of every parameter, by Hugging Face's name; of tied ones the first.
        dtypes: Likewise.
    """

    def __init__(
        self,
        meeting: Meeting,
        wired: Wires,
        held: Mapping[str, Share],
        everybody: Sequence[Sequence[Run]],
    ) -> None:
        self.shapes = {name: share.shape for name, share in held.items()}
        self.dtypes = {name: share.values.dtype for name, share in held.items()}
        self._meeting = meeting
        self._wired = wired
        self._held = held
        self._runs = {runs[0].name: runs for runs in zip(*everybody, strict=True)}

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that gets what is read."""
        return self._meeting.rank == 0

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter whole on rank 0, and an empty tensor elsewhere; all ranks call it."""
        share = self._held[name]
        whole = take_in(self._meeting, self._wired, self._runs[name], share.values)
        if whole is None:
            return torch.empty(0, dtype=share.values.dtype)
        size = torch.Size(share.shape)
        if whole.numel() != size.numel():
            raise CheckpointError(
                f"{name}: the ranks hold {whole.numel()} of its {size.numel()} values"
            )
        return whole.view(size)


@contextmanager
def gathering(model: nn.Module, timeout: float = _TIMEOUT) -> Iterator[Gathering]:
    """Let the parameters of a sharded model be read whole, on rank 0; all ranks take part.

    Args:
        model: Sharded by FSDP2, or by FSDP1 with `use_orig_params`.
        timeout: Seconds without a sign of life after which another rank is given up.

    Raises:
        RankLostError: (a `RuntimeError`) Another rank died, hangs, or failed.
    """
    meeting = Meeting.of_all("gathering", timeout)
    held = {share.name: share for share in shares(model)}
    runs = [
        Run(s.name, s.start, s.values.numel(), dtype_name(s.values.dtype)) for s in held.values()
    ]
    with meeting.attended():
        everybody = exchange_runs(meeting, "runs", runs)
        with wires(meeting) as wired:
            yield Gathering(meeting, wired, held, everybody)


def can_gather(model: nn.Module) -> bool:
    """Whether a model is sharded so that its parameters can be read one by one."""
    wrapped = fsdp1_modules(model)
    if wrapped:
        return all(outer._use_orig_params for outer in wrapped)  # noqa: SLF001 - nowhere else told
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    return bool(sharded) and all(_is_by_rows(p) for p in model.parameters())


def full_tensors(
    model: nn.Module, names: Sequence[str] | None = None, timeout: float = _TIMEOUT
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the parameters of a sharded model one after the other, whole on rank 0.

    Every rank must iterate to the end.  Peak memory of rank 0: its share, and one tensor.

    Args:
        model: Sharded by `load_sharded`, or by FSDP.
        names: Of those that are wanted, in this order; all when left out.
        timeout: Seconds without a sign of life after which another rank is given up.

    Yields:
        Hugging Face's name (of tied ones the first), and the tensor on the CPU; `None` on ranks
        other than 0.
    """
    with gathering(model, timeout) as gathered:
        for name in gathered.shapes if names is None else names:
            tensor = gathered.read(name)
            yield name, (tensor if gathered.is_first else None)


def _is_by_rows(parameter: nn.Parameter) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    return all(place.is_replicate() or place.is_shard(0) for place in parameter.placements)
