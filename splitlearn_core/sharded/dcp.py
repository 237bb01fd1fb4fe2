"""Model and optimizer in `torch.distributed.checkpoint` (DCP) folders, at any number of ranks.

Format: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html; `.metadata` says which
piece of which tensor lies in which file, so that other ranks, more or fewer, find their own.  The
names in it are `model.NAME` and `optim.state.NAME.KEY`, where NAME is Hugging Face's, whatever the
model is wrapped in: a part reads its layers from a folder of the whole model.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule

from splitlearn_core.checkpoint.models.wrappers import fsdp1_modules, plain_name, unwrapped
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError, StorageError
from splitlearn_core.headers import listed
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.sharded.dcp_reader import PlainPlanner, PlainReader
from splitlearn_core.split_model import SplitModel
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    from torch import nn

MODEL = "model"
OPTIMIZER = "optim"

_STATE = "state"
_GROUPS = "param_groups"
_PARAMS = "params"
_PART_PREFIX = "model."
# Tensors that one message names.
_SHOWN = 20


def save_dcp(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a model, and its optimizer's state, as a DCP folder; every rank writes its own share.

    Every rank calls it with the same folder, on a file system that all of them see; without a
    process group the one process writes all.  The folder appears under its name when it is
    complete, and synced to the disk.

    Args:
        folder: A new one, or an empty one.
        model: A part or a whole model: plain, or sharded by `load_sharded`, FSDP1 or FSDP2.
        optimizer: Of this model's parameters.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: The optimizer has parameters that are not the model's.
        StorageError: (an `OSError`) It can't be written; nothing is left.
    """
    target = user_path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty; name another folder for the checkpoint")
    state: dict[str, Any] = {MODEL: _model_state(model)}
    if optimizer is not None:
        check_optimizer(model, optimizer)
        state[OPTIMIZER] = _optimizer_state(model, optimizer)
    unfinished = target.with_name(f".{target.name}.unfinished")
    with _writing(target, unfinished):
        if _rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        _wait_for_all()
        with _without_warning():
            save(state, storage_writer=FileSystemWriter(unfinished), no_dist=not _is_grouped())
        if _rank() == 0:
            _put_in_place(unfinished, target)
        _wait_for_all()


def load_dcp(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Read a DCP folder into a model and its optimizer, each rank its own share.

    The number of ranks need not be the one that it was written at, nor need there be a process
    group; a part reads what is its own from a folder of the whole model.

    Args:
        folder: Written by `save_dcp`, or by DCP under the same names.
        model: Changed in place: plain, or sharded.  Its dtypes must be those that were saved.
        optimizer: Changed in place, its settings (learning rate, …) too; of this model's
            parameters.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) No DCP folder is there.
        CheckpointError: (a `ValueError`) It is damaged, or lacks tensors, or has them in other
            shapes or dtypes; names the file, or all the tensors.
        ValueError: The optimizer has parameters that are not the model's.
    """
    path = user_path(folder)
    reader = PlainReader(path)
    found = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {MODEL: _without_twins(model, _model_state(model), found)}
    if optimizer is not None:
        check_optimizer(model, optimizer)
        state[OPTIMIZER] = _optimizer_state(model, optimizer)
    _check_fit(state, found, path)
    try:
        with _without_warning():
            load(state, storage_reader=reader, planner=PlainPlanner(), no_dist=not _is_grouped())
    except CheckpointException as error:
        raise CheckpointError(f"{path} can't be read: {_causes(error)}") from error
    if fsdp1_modules(model):  # whose state dict is a copy
        options = StateDictOptions(strict=False)  # the twins; what is missing was seen above
        set_model_state_dict(model, _renamed(model, state[MODEL], _inner_name), options=options)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, _optimizer_names(model, state, _inner_name))


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that would train something else than the model's own parameters.

    One that was made while FSDP2 had its parameters gathered (after a forward, before a backward)
    has the gathered ones: it trains nothing that lasts.

    Raises:
        ValueError: It has such parameters; says how many, and of which shapes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    own = {id(parameter) for parameter in model.parameters()}
    strangers = [
        list(parameter.shape)
        for group in optimizer.param_groups
        for parameter in group[_PARAMS]
        if id(parameter) not in own
    ]
    if strangers:
        raise ValueError(
            f"the optimizer has {len(strangers)} parameters that are not the model's, of the shapes"
            f" {short(strangers)}: it was made of another model, or while this one had its"
            " parameters gathered.  Make it before the first forward, or after model.reshard()"
        )


# --- names -------------------------------------------------------------------------------------


def _inner_name(model: nn.Module, name: str) -> str:
    """Return what torch calls a tensor of this model, of which Hugging Face's name is given."""
    return f"{_PART_PREFIX}{name}" if isinstance(unwrapped(model), SplitModel) else name


def _outer_name(model: nn.Module, name: str) -> str:
    """Return Hugging Face's name of a tensor, of which torch's is given."""
    is_part = isinstance(unwrapped(model), SplitModel)
    return name.removeprefix(_PART_PREFIX) if is_part else name


def _renamed(model: nn.Module, values: Mapping[str, Any], rename: Any) -> dict[str, Any]:
    return {rename(model, name): value for name, value in values.items()}


def _model_state(model: nn.Module) -> dict[str, Any]:
    """Return the model's tensors by Hugging Face's names, of tied ones each name."""
    return _renamed(model, get_model_state_dict(model), _outer_name)


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by Hugging Face's names; it is made where it is not there."""
    state = {OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
    return _optimizer_names(model, state, _outer_name)


def _optimizer_names(model: nn.Module, state: Mapping[str, Any], rename: Any) -> dict[str, Any]:
    given = state[OPTIMIZER]
    groups = [
        {**group, _PARAMS: [rename(model, name) for name in group[_PARAMS]]}
        for group in given[_GROUPS]
    ]
    return {_STATE: _renamed(model, given[_STATE], rename), _GROUPS: groups}


def _without_twins(
    model: nn.Module, state: dict[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Leave out the names of tied tensors that a checkpoint has by their other name alone."""
    twins: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(_outer_name(model, plain_name(name)))
    absent = {
        name
        for names in twins.values()
        for name in names
        if f"{MODEL}.{name}" not in found and any(f"{MODEL}.{twin}" in found for twin in names)
    }
    return {name: value for name, value in state.items() if name not in absent}


def _check_fit(state: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Compare what is needed with what is there, by name, shape and dtype."""
    needed = dict(_tensors(state))
    if missing := needed.keys() - found.keys():
        raise CheckpointError(f"{folder} lacks tensors that are needed: {listed(missing)}")
    wrong = []
    for name, tensor in needed.items():
        stored = found[name]
        if not isinstance(stored, TensorStorageMetadata):
            wrong.append(f"{name} is no tensor")
        elif tuple(stored.size) != tuple(tensor.shape):
            wrong.append(f"{name} is {list(stored.size)}, the model's is {list(tensor.shape)}")
        elif stored.properties.dtype != tensor.dtype:
            theirs, ours = dtype_name(stored.properties.dtype), dtype_name(tensor.dtype)
            wrong.append(f"{name} is {theirs}, the model's is {ours}: load the model so")
    if wrong:
        raise CheckpointError(f"{folder}: {'; '.join(wrong[:_SHOWN])}{_and_more(wrong)}")


def _and_more(wrong: list[str]) -> str:
    return f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts, by the names that DCP gives them."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


# --- ranks and folders -------------------------------------------------------------------------


def _is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_grouped() else 0


def _wait_for_all() -> None:
    if _is_grouped():
        dist.barrier()


@contextmanager
def _writing(target: Path, unfinished: Path) -> Iterator[None]:
    """Say where it was, when a folder can't be written, and leave nothing."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        if _rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        why = _causes(error) if isinstance(error, CheckpointException) else in_one_line(error)
        raise StorageError(
            f"the checkpoint can't be saved in {target}: {why}; nothing of it is left.  Make room,"
            " or name another folder",
            getattr(error, "errno", None),
        ) from error


@contextmanager
def _without_warning() -> Iterator[None]:
    """Keep torch from warning of what is meant: one process, without a group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _causes(error: CheckpointException) -> str:
    """Return what went wrong, rank by rank; torch would add a page of traceback for each."""
    failures: Iterable[tuple[int, Any]] = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {in_one_line(failure[0])}" for rank, failure in failures)


def _put_in_place(unfinished: Path, target: Path) -> None:
    """Give a complete folder its name, on the disk too."""
    _sync(unfinished)
    if target.is_dir():
        target.rmdir()
    unfinished.rename(target)
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Write a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
