"""A model's tensors by their plain names, whatever the model is wrapped in, one at a time.

Nothing of the model is changed: not its mode, its dtypes, its devices or its gradients.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from splitlearn_core.adapter_layers import refuse_adapters
from splitlearn_core.causal_lm import SplitCausalLM
from splitlearn_core.checkpoint.models.plain_names import plain_name
from splitlearn_core.checkpoint.models.wrappers import fsdp1_modules, unwrapped
from splitlearn_core.errors import PackedWeightsError
from splitlearn_core.headers import listed
from splitlearn_core.sharded.gathering import Gathering, can_gather, gathering
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@dataclass(frozen=True)
class ModelState:
    """Names and tensors of a model; sharded ones are put together when they are read.

    Attributes:
        tensors: By name; of tied ones the first.
        twins: Names of tied tensors that are left out -> the name that stands for them.
        sharded: Whether ranks hold shares, and must read the same names in the same order.
        lent: Whether their memory will be taken back: FSDP1 could not, had anybody looked at it
            by way of NumPy, so that what is read is a copy.
        gather: Puts one together on rank 0 alone; `tensors` then have no values.
    """

    tensors: Mapping[str, torch.Tensor]
    twins: Mapping[str, str]
    sharded: bool
    lent: bool = False
    gather: Callable[[str], torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor whole; of a sharded model every rank must ask for it."""
        if self.gather is not None:
            return self.gather(name)
        tensor = whole_tensor(self.tensors[name])
        return tensor.clone() if self.lent else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a `DTensor` is a share of, which every rank must ask for; others as they are."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    share: Any = tensor
    device = torch.device(share.device_mesh.device_type)
    if share.device.type != device.type:  # offloaded: nothing can be gathered there
        share = share.to(device)
    full: torch.Tensor = share.full_tensor()
    return full


@contextmanager
def state_of(model: nn.Module) -> Iterator[ModelState]:
    """Lend the state of a model: a part's, a chain's of parts, transformers' or any module's.

    Of a model that FSDP shards nothing is put together until it is read, and then on rank 0 alone.
    Where FSDP1 has not kept the original parameters, it is put together for as long, in the memory
    of rank 0, which alone has names then.

    Raises:
        PackedWeightsError: (a `RuntimeError`) Its weights are packed.
        ValueError: It has adapters, tensors on meta, or parts that are elsewhere.
    """
    refuse_adapters(model)
    if can_gather(model):
        with gathering(model) as gathered:
            yield _sharded_state(model, gathered)
        return
    if not fsdp1_modules(model):
        yield _state(model)
        return
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - slow

    # on the CPU already, FSDP1 would "offload" a parameter by freeing it
    on_cpu = next(model.parameters()).device.type == "cpu"
    with FullyShardedDataParallel.summon_full_params(
        model, writeback=False, rank0_only=True, offload_to_cpu=not on_cpu
    ):
        state = _state(model) if distributed.get_rank() == 0 else ModelState({}, {}, sharded=True)
        yield replace(state, sharded=True, lent=True)


def _sharded_state(model: nn.Module, gathered: Gathering) -> ModelState:
    """Describe a sharded model's tensors; each is put together when it is read."""
    local = _state(model)
    tensors = {
        name: torch.empty(gathered.shapes[name], dtype=gathered.dtypes[name], device="meta")
        if name in gathered.shapes
        else tensor
        for name, tensor in local.tensors.items()
    }

    def gather(name: str) -> torch.Tensor:
        if name in gathered.shapes:
            return gathered.read(name)
        return whole_tensor(local.tensors[name])  # a buffer, which every rank has

    return ModelState(tensors, local.twins, sharded=True, gather=gather)


def _state(model: nn.Module) -> ModelState:
    """Collect a model's tensors, of tied ones the first."""
    tensors: dict[str, torch.Tensor] = {}
    twins: dict[str, str] = {}
    firsts: dict[Any, str] = {}
    for module in modules_of(model):
        for own, tensor in stored_tensors(module):
            name = plain_name(own)
            first = firsts.setdefault(identity(tensor), name)
            if first != name:
                twins[name] = first
            else:
                tensors[name] = tensor
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"these tensors have no values, they are on meta: {listed(meta)}")
    return ModelState(tensors, twins, any(isinstance(t, DTensor) for t in tensors.values()))


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state dict of a module has, without what wrappers' hooks would make of it."""
    for path, within in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in within.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + name, parameter
        for name, buffer in within.named_buffers(recurse=False, remove_duplicate=False):
            if name not in within._non_persistent_buffers_set:  # noqa: SLF001
                yield prefix + name, buffer


def identity(tensor: torch.Tensor) -> Any:
    """Return what two names of one tensor have in common."""
    if isinstance(tensor, DTensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose names are those of a checkpoint: of a chain, one for each part.

    Raises:
        PackedWeightsError: (a `RuntimeError`) Weights are packed.
        ValueError: A part of a chain is elsewhere.
    """
    within = unwrapped(model)
    if not isinstance(within, SplitCausalLM):
        return [_own(within)]
    if absent := [part for part in within.parts if not isinstance(part, nn.Module)]:
        raise ValueError(
            f"{type(absent[0]).__name__}: a part of this chain is elsewhere, and its weights with"
            " it; save the parts that are here: part.save(folder)"
        )
    return [_own(unwrapped(part)) for part in within.parts]


def _own(module: nn.Module) -> nn.Module:
    """Return transformers' model in a part; any other module as it is."""
    if not isinstance(module, SplitModel):
        return module
    if module.packing is not None:
        raise PackedWeightsError(
            f"the weights of {module.component} are packed ({module.quantization}); load it without"
            " quantization to save it"
        )
    return unwrapped(module.model)
