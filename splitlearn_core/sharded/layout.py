"""Sharding a shell with torch: FSDP2 (`fully_shard`) or FSDP1, and where each rank's share lies.

Each decoder layer is a unit that is gathered, used and let go; the root holds the rest.  Parameters
that layers share belong to the root as well: a unit can't own what another uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as Wrapped
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from splitlearn_core.checkpoint.models.wrappers import fsdp1_modules, plain_name, unwrapped
from splitlearn_core.errors import UnsupportedModelError
from splitlearn_core.headers import listed
from splitlearn_core.pruning import put_passage_outside
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from splitlearn_core.sharded.shell import Shell

How = Literal["fsdp1", "fsdp2"]
STRATEGIES = tuple(strategy.name for strategy in ShardingStrategy)


@dataclass(frozen=True)
class Sharding:
    """How a part is sharded.

    Attributes:
        how: `fsdp2` or `fsdp1`.
        mesh: The ranks.  One dimension: parameters are sharded over all of them; two: replicated
            over the first, sharded over the second.
        param_dtype: What parameters are gathered and computed in; `None`: their own.
        reduce_dtype: What gradients are summed in; `None`: `param_dtype`.
        reshard_after_forward: FSDP2's: whether layers let gathered parameters go after a forward.
        sharding_strategy: FSDP1's, by name.
    """

    how: How
    mesh: DeviceMesh
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool | int | None = None
    sharding_strategy: str = "FULL_SHARD"

    @property
    def device(self) -> torch.device:
        """Where this rank's share goes."""
        kind = self.mesh.device_type
        if kind == "cpu":
            return torch.device("cpu")
        return torch.device(kind, torch.accelerator.current_device_index())


@dataclass(frozen=True)
class Share:
    """The values of one parameter that this rank holds: `start` to `stop` of the flattened whole.

    Attributes:
        name: Hugging Face's.
        start: First value.
        values: They themselves, flat; writing into them changes the parameter.
        shape: The whole parameter's.
    """

    name: str
    start: int
    values: torch.Tensor
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last value."""
        return self.start + self.values.numel()


def apply_sharding(shell: Shell, sharding: Sharding) -> nn.Module:
    """Shard a shell, and give this rank's share memory, without values yet.

    Returns:
        What is trained: the shell's root itself (FSDP2), or what FSDP1 wraps around it.

    Raises:
        UnsupportedModelError: (a `KeyError`) The architecture's parameters can't be sharded so.
    """
    _check_scalars(shell)
    if sharding.how == "fsdp2":
        return _fully_shard(shell, sharding)
    return _wrap(shell, sharding)


def shares(module: nn.Module) -> Iterator[Share]:
    """Yield what this rank holds of each parameter of a sharded (or plain) model.

    Of tied parameters the first name comes alone; plain parameters are held whole.  What FSDP2 has
    gathered is let go first: it may be older than the share.
    """
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()
    flat = {id(p) for wrapped in fsdp1_modules(module) for p in _originals(wrapped)}
    prefix = "model." if isinstance(unwrapped(module), SplitModel) else ""
    for found in _fsdp1_shares(module):
        yield Share(found.name.removeprefix(prefix), found.start, found.values, found.shape)
    for name, parameter in module.named_parameters():
        if id(parameter) not in flat:
            yield _share(plain_name(name).removeprefix(prefix), parameter)


# --- FSDP2 -------------------------------------------------------------------------------------


def _fully_shard(shell: Shell, sharding: Sharding) -> nn.Module:
    policy = MixedPrecisionPolicy(sharding.param_dtype, sharding.reduce_dtype)
    shard = partial(
        fully_shard,
        mesh=sharding.mesh,
        mp_policy=policy,
        reshard_after_forward=sharding.reshard_after_forward,
    )
    for unit in _units(shell, only_trained=True):
        shard(unit)
    for layer in shell.layers:
        put_passage_outside(layer)
    shard(shell.root)
    _give_memory(shell, sharding.device)
    shell.root.register_forward_hook(_reshard_unless_training)
    return shell.root


def _reshard_unless_training(root: nn.Module, *_: Any) -> None:
    """Let the root's gathered parameters go after a forward that no backward follows.

    FSDP2 keeps them for the backward.  An optimizer that is made then would get the gathered ones,
    which are thrown away with the next forward: it would train nothing, and not say so.
    """
    if isinstance(root, FSDPModule) and not torch.is_grad_enabled():
        root.reshard()


def _give_memory(shell: Shell, device: torch.device) -> None:
    """Replace this rank's shards, which are on meta, by such as have memory.

    That memory is not touched before values are put in; nothing else is moved, and what is tied
    stays so.
    """

    def here(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    names: dict[int, list[str]] = {}
    for name, parameter in shell.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shell.root._apply(here)  # type: ignore[no-untyped-call]  # noqa: SLF001 - what `to_empty` does, but to what is on meta alone
    for first, *twins in names.values():
        for twin in twins:
            path, _, last = twin.rpartition(".")
            one = shell.model.get_parameter(first)
            shell.model.get_submodule(path)._parameters[last] = one  # noqa: SLF001


def _share(name: str, parameter: nn.Parameter) -> Share:
    """Return what is here of a parameter: rows that follow one another, or all."""
    if not isinstance(parameter, DTensor):
        return Share(name, 0, parameter.detach().view(-1), tuple(parameter.shape))
    shape, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    local = parameter.to_local().detach()
    row = parameter.numel() // max(1, parameter.shape[0])
    if shape[1:] != tuple(parameter.shape[1:]):
        raise ValueError(f"{name} is sharded along another dimension than its first")
    start = offsets[0] * row if local.numel() else 0
    return Share(name, start, local.view(-1), tuple(parameter.shape))


# --- FSDP1 -------------------------------------------------------------------------------------


def _wrap(shell: Shell, sharding: Sharding) -> nn.Module:
    units = {id(unit) for unit in _units(shell, only_trained=False)}
    layers = {id(layer): layer for layer in shell.layers}
    precision = MixedPrecision(sharding.param_dtype, sharding.reduce_dtype)
    wrapped = Wrapped(
        shell.root,
        device_mesh=sharding.mesh,
        sharding_strategy=ShardingStrategy[sharding.sharding_strategy],
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in units),
        mixed_precision=precision,
        param_init_fn=_Materialize(sharding.device),
        device_id=sharding.device,
        use_orig_params=True,
    )
    for outer in fsdp1_modules(wrapped):
        if id(outer.module) in layers:
            put_passage_outside(outer.module, outer)
    return wrapped


class _Materialize:
    """Gives the parameters of one module at a time memory, which values are put into later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[int, nn.Parameter] = {}
        self._kept: list[nn.Parameter] = []  # so that no other object gets the number of one

    def __call__(self, module: nn.Module) -> None:
        """Give memory to a module's own parameters; tied ones stay one."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module._parameters[name] = self._real(parameter)  # noqa: SLF001

    def _real(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._made:
            empty = torch.empty_like(parameter, device=self._device)
            self._made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            self._kept.append(parameter)
        return self._made[id(parameter)]


def _originals(wrapped: Wrapped) -> list[nn.Parameter]:
    handle: Any = wrapped._handle  # noqa: SLF001 - nowhere else does it tell
    return [] if handle is None else [handle.flat_param, *(handle.flat_param._params or ())]  # noqa: SLF001


def _fsdp1_shares(module: nn.Module) -> Iterator[Share]:
    """Yield what this rank holds of the flat parameters that FSDP1 has made of many."""
    for path, outer in module.named_modules():
        handle: Any = outer._handle if isinstance(outer, Wrapped) else None  # noqa: SLF001
        if handle is None:
            continue
        flat = handle.flat_param
        # documented in torch's FlatParameter, and nowhere else to be had
        names, shapes, places = flat._fqns, flat._shapes, flat._shard_param_infos  # noqa: SLF001
        for relative, shape, info in zip(names, shapes, places, strict=True):
            name = plain_name(f"{path}.{relative}" if path else relative)
            begin, count = info.offset_in_shard or 0, info.numel_in_shard or 0
            values = flat.detach()[begin : begin + count]
            yield Share(name, info.intra_param_start_idx or 0, values, tuple(shape))


# --- units -------------------------------------------------------------------------------------


def _units(shell: Shell, *, only_trained: bool) -> list[nn.Module]:
    """Return the modules that are gathered by themselves, inner ones first.

    They are the decoder layers, and within those (and the root) what has another dtype: torch
    gathers one dtype at a time; FSDP2 minds only that of what is trained.
    """
    alone = [layer for layer in shell.layers if _owns_all(layer, shell)]
    inner = [
        m for unit in [*alone, shell.root] for m in _of_other_dtypes(unit, alone, only_trained)
    ]
    distinct = {id(module): module for module in [*inner, *alone]}
    return list(distinct.values())


def _owns_all(layer: nn.Module, shell: Shell) -> bool:
    """Whether nobody else uses a layer's parameters."""
    users = Counter(id(p) for _, p in shell.model.named_parameters(remove_duplicate=False))
    within = Counter(id(p) for _, p in layer.named_parameters(remove_duplicate=False))
    return bool(within) and all(users[key] == count for key, count in within.items())


def _of_other_dtypes(
    unit: nn.Module, apart: list[nn.Module], only_trained: bool
) -> Iterator[nn.Module]:
    """Yield the modules within a unit whose parameters all have another dtype than most.

    Raises:
        UnsupportedModelError: (a `KeyError`) One module has parameters of several.
    """
    others = {id(p) for other in apart if other is not unit for p in other.parameters()}
    own = [p for p in unit.parameters() if id(p) not in others and _counts(p, only_trained)]
    sizes: Counter[torch.dtype] = Counter()
    for parameter in own:
        sizes[parameter.dtype] += parameter.numel()
    if len(sizes) < 2:  # noqa: PLR2004 - one dtype, or none
        return
    [(main, _)] = sizes.most_common(1)
    for path, module in unit.named_modules():
        direct = {p.dtype for p in module.parameters(recurse=False) if _counts(p, only_trained)}
        if direct and direct != {main} and id(next(module.parameters(recurse=False))) not in others:
            if len(direct) > 1:
                said = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in direct))
                raise UnsupportedModelError(
                    f"{path} has parameters in {said}, which FSDP can't gather together: load the"
                    " model with dtype='float32'"
                )
            yield module


def _counts(parameter: nn.Parameter, only_trained: bool) -> bool:
    return parameter.requires_grad or not only_trained


def _check_scalars(shell: Shell) -> None:
    """Refuse parameters without a dimension, of which no rank can have a part."""
    scalars = [name for name, parameter in shell.model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise UnsupportedModelError(
            f"{shell.outline.model_type} has parameters without a dimension, which FSDP can't"
            f" shard: {listed(scalars)}"
        )
