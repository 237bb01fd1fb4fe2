"""Bring a part's tensors in, one after the other.

Peak memory is the part's final size plus two tensors (or the tensors that are fused into one, where
a converter does that).  Where neither dtype nor device changes, a tensor stays a view of the
mapped file: no anonymous memory at all, until somebody writes to it.  With a quantization nothing
stays mapped, and each linear layer is packed as soon as it is complete (see `packing.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.huge_pages import HugeArena
from splitlearn_core.loading.ahead import ahead
from splitlearn_core.loading.conversion import check_conversions, convert
from splitlearn_core.loading.packing import Packer
from splitlearn_core.loading.precision import settle_each
from splitlearn_core.skeleton import initialise_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.loading.names import NameMap, Recipe
    from splitlearn_core.loading.packing import PackingPlan
    from splitlearn_core.loading.precision import Dtypes
    from splitlearn_core.loading.sources import StoredTensor, TensorSource
    from splitlearn_core.loading.stages import Progress

# Tensors that one message names.
_SHOWN = 20


@dataclass(frozen=True)
class Placement:
    """What becomes of a tensor once it is read.

    Attributes:
        device: Where it goes.
        dtype: What is asked for; `None` keeps what is stored.  `precision.py` has what becomes of
            each tensor.
        mmap: Whether it may stay a view of the mapped file.
        quantization: How linear layers are packed, see `splitlearn_core.quantization`.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    mmap: bool = True
    quantization: str | None = None

    @property
    def maps(self) -> bool:
        """Whether tensors may stay mapped: of a file that is packed they don't, to let it go."""
        return self.mmap and self.quantization is None

    def copies(self, stored: StoredTensor) -> bool:
        """Whether a stored tensor needs memory of its own."""
        stays = self.maps and self.device.type == "cpu"
        return not stays or stored.final_dtype is not stored.dtype


@dataclass(frozen=True)
class PartReads:
    """What a part needs from a checkpoint.

    Attributes:
        recipes: The part's tensor -> how it gets its values.
        stored: The checkpoint's name -> what is known of that tensor, for all that are needed.
        ties: The part's tensor -> the one that it shares its values with.
        dtype: The one that the part is built with; single tensors may have another.
    """

    recipes: Mapping[str, Recipe]
    stored: Mapping[str, StoredTensor]
    ties: Mapping[str, str]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes to read, each stored tensor once."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def distinct(self) -> Iterator[tuple[Recipe, list[str]]]:
        """Yield each recipe once, with all the part's tensors that it gives values to."""
        users: dict[int, tuple[Recipe, list[str]]] = {}
        for target, recipe in self.recipes.items():
            users.setdefault(id(recipe), (recipe, []))[1].append(target)
        yield from users.values()


def plan_reads(
    part: PreTrainedModel,
    names: NameMap,
    source: TensorSource,
    checkpoint: str,
    dtypes: Dtypes,
) -> PartReads:
    """Return what `part` (pruned, on meta) needs from `source`.

    Args:
        part: Of the model that the names were mapped for.
        names: From `map_names`.
        source: Where the tensors are.
        checkpoint: Names it in errors.
        dtypes: What is known of them so far.

    Raises:
        CheckpointError: Tensors are missing, of another shape than the config says, or strangers;
            names them all.
    """
    targets = part.state_dict()
    recipes = {target: recipe for target in targets if (recipe := names.find(target)) is not None}
    if missing := targets.keys() - recipes.keys():
        raise CheckpointError(f"{checkpoint} lacks tensors that are needed: {listed(missing)}")
    if names.unknown:
        raise CheckpointError(
            f"{checkpoint} has tensors that no part of this architecture has a place for:"
            f" {listed(names.unknown)}"
        )
    stored = {name: source.info(name) for recipe in recipes.values() for name in recipe.stored}
    dtype = dtypes.settle(stored, source)
    stored = settle_each(part, recipes, stored, dtypes.built_as, dtype)
    reads = PartReads(recipes, stored, names.ties, dtype)
    _check_fit(targets, reads, source)
    check_conversions(part, recipes.values(), stored, source)
    return reads


def materialize(
    part: PreTrainedModel,
    reads: PartReads,
    source: TensorSource,
    placement: Placement,
    progress: Progress | None = None,
    packing: PackingPlan | None = None,
) -> None:
    """Give every tensor of `part` its value.

    Args:
        part: Pruned, on the meta device; changed in place.
        reads: From `plan_reads`.
        source: Where the tensors are.
        placement: Device, dtype and privacy of the result.
        progress: Called with (bytes done, bytes in all) before each tensor and at the end.  What
            it raises ends the load.
        packing: Which layers are packed.

    Raises:
        CheckpointError: A tensor can't be read or converted.
        QuantizationError: (a `ValueError`) One can't be packed.
    """
    done = 0
    packer = Packer(packing)
    with closing(_cooked(part, reads, source, placement, packing)) as cooked:
        for recipe, targets, values in cooked:
            if progress is not None:
                progress(done, reads.nbytes)
            for target in targets:
                _assign(part, target, _value_for(target, recipe, values, reads.ties))
            values.clear()  # what is packed is let go at once
            for target in targets:
                packer.arrived(part, target)
            done += sum(reads.stored[name].nbytes for name in recipe.stored)
    _tie(part, reads)
    initialise_buffers(part, placement.device, _absent_twins(part, reads))
    packer.finish(part)
    if progress is not None:
        progress(reads.nbytes, reads.nbytes)


def _check_fit(targets: Mapping[str, torch.Tensor], reads: PartReads, source: TensorSource) -> None:
    """Compare every stored tensor with the one that the config makes of it."""
    wrong = [
        f"{name} in {source.where(name)} is {found}, the config needs {wanted}"
        for target, recipe in reads.recipes.items()
        for name in recipe.stored
        for found, wanted in _misfits(reads.stored[name], targets[target], recipe)
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError("; ".join(wrong[:_SHOWN]) + more)


def _misfits(
    stored: StoredTensor, target: torch.Tensor, recipe: Recipe
) -> Iterator[tuple[str, str]]:
    """Yield what is stored and what is needed instead.

    A tensor that is converted gets its shape by that.  Whole numbers are no weights, nor the
    other way round.
    """
    if recipe.converter is None and stored.shape != tuple(target.shape):
        yield str(list(stored.shape)), str(list(target.shape))
    if stored.dtype.is_floating_point != target.is_floating_point():
        kind = "a floating-point dtype" if target.is_floating_point() else "whole numbers"
        yield dtype_name(stored.dtype), kind


def _cooked(
    part: PreTrainedModel,
    reads: PartReads,
    source: TensorSource,
    placement: Placement,
    packing: PackingPlan | None,
) -> Generator[tuple[Recipe, list[str], dict[str, torch.Tensor]]]:
    """Yield each recipe, the tensors that it is for, and their values, by the model's names.

    What is only copied is copied a little ahead, in other threads; tensors are opened in this one.
    What a converter makes is made alone: it may be as large as a whole layer.
    """
    plain = [(recipe, users) for recipe, users in reads.distinct() if recipe.converter is None]
    passing = frozenset() if packing is None else packing.stored
    names = [recipe.stored[0] for recipe, _ in plain]
    copies = _copies(names, reads, source, placement, passing)
    for recipe, users in plain:
        yield recipe, users, {recipe.target: next(copies)}  # kept by nobody here
    for recipe, users in reads.distinct():
        if recipe.converter is not None:
            tensors = (job() for job in _jobs(recipe.stored, reads, source, placement, passing))
            yield recipe, users, convert(part, recipe, tensors, source)


def _copies(
    names: Sequence[str],
    reads: PartReads,
    source: TensorSource,
    placement: Placement,
    passing: AbstractSet[str],
) -> Iterator[torch.Tensor]:
    """Return stored tensors where and how they are wanted, in order."""
    jobs = _jobs(names, reads, source, placement, passing)
    if any(placement.copies(reads.stored[name]) for name in names):
        return ahead(jobs)
    return (job() for job in jobs)


def _jobs(
    names: Iterable[str],
    reads: PartReads,
    source: TensorSource,
    placement: Placement,
    passing: AbstractSet[str],
) -> Iterator[Callable[[], torch.Tensor]]:
    """Open stored tensors one by one, and yield what brings each where it is wanted.

    Those in `passing` are dropped again soon: they need no copy of their own, and where they must
    be cast, that has memory of its own, so that it leaves no holes between what stays.
    """
    arena = HugeArena()
    for name in names:
        stays = name not in passing
        place = partial(
            _place,
            device=placement.device,
            dtype=reads.stored[name].final_dtype,
            private=stays and not placement.maps,
            arena=arena if stays else HugeArena(),
        )
        yield partial(_bring, source, source.read(name), place)


def _value_for(
    target: str, recipe: Recipe, values: Mapping[str, torch.Tensor], ties: Mapping[str, str]
) -> torch.Tensor:
    """Return the one of a recipe's tensors that `target`, or its tied twin, is to have."""
    if target in values:
        return values[target]
    if len(values) == 1 and (recipe.converter is None or target in ties):
        return next(iter(values.values()))
    raise CheckpointError(
        f"{listed(recipe.stored)} were expected to make {target}, they made {listed(values)}"
    )


def _bring(
    source: TensorSource, tensor: torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return `tensor`, which is the source's, where and how it is wanted."""
    placed = place(tensor)
    if placed.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        source.copied(tensor)
    return placed


def _place(
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    *,
    private: bool,
    arena: HugeArena,
) -> torch.Tensor:
    """Return `tensor` where and how it is wanted."""
    if device.type != "cpu":
        return tensor.to(device=device, dtype=dtype)
    if private or tensor.dtype != dtype:
        return arena.empty(tensor.shape, dtype).copy_(tensor)
    return tensor


def _assign(part: nn.Module, target: str, value: torch.Tensor) -> None:
    """Put `value` in the place of the meta tensor called `target`."""
    path, _, name = target.rpartition(".")
    module = part.get_submodule(path)
    # by way of the dicts, the one way in that leaves names, hooks and requires_grad ours
    slots: Iterable[dict[str, Any]] = (module._parameters, module._buffers)  # noqa: SLF001
    slot = next(slot for slot in slots if name in slot)
    shape = getattr(slot[name], "shape", value.shape)
    if shape != value.shape:
        raise CheckpointError(f"{target} came out as {list(value.shape)}, not {list(shape)}")
    if slot is module._parameters:  # noqa: SLF001
        value = nn.Parameter(value, requires_grad=value.is_floating_point())
    slot[name] = value


def _tie(part: nn.Module, reads: PartReads) -> None:
    """Let tied tensors that are both here be one object, as transformers does.

    Where the checkpoint has both, and they differ, they stay apart: so does transformers.
    """
    for target, origin in reads.ties.items():
        if target not in reads.recipes or origin not in reads.recipes:
            continue
        ours, theirs = _get(part, target), _get(part, origin)
        if reads.recipes[target] is reads.recipes[origin] or torch.equal(ours, theirs):
            path, _, name = target.rpartition(".")
            setattr(part.get_submodule(path), name, theirs)


def _absent_twins(part: PreTrainedModel, reads: PartReads) -> dict[str, nn.Module]:
    """Return the absent modules whose weight is here by another name, as they would be if present.

    What an architecture does to the one, it must do to the other.
    """
    twins: dict[str, nn.Module] = {}
    for target, origin in reads.ties.items():
        path, _, name = origin.rpartition(".")
        if target in reads.recipes and origin not in reads.recipes:
            real = getattr(part.get_submodule(path), "real", None)
            if isinstance(real, nn.Module):
                twins[path] = copy.copy(real)
                twins[path]._parameters = {name: _get(part, target)}  # type: ignore[dict-item]  # noqa: SLF001
    return twins


def _get(part: nn.Module, target: str) -> torch.Tensor:
    """Return a parameter or buffer by its name."""
    path, _, name = target.rpartition(".")
    tensor = getattr(part.get_submodule(path), name)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{target} is no tensor")
    return tensor
