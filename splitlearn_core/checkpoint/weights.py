"""Save a model's weights for inference, and load them again."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.core_model_loading import revert_weight_conversion

from splitlearn_core.atomic_files import replacing
from splitlearn_core.checkpoint.models.model_folder import ModelFolder, write_folder
from splitlearn_core.checkpoint.models.model_state import ModelState, state_of
from splitlearn_core.checkpoint.models.ranks import Read, write_together
from splitlearn_core.dtypes import as_dtype, dtype_name, main_dtype
from splitlearn_core.errors import CheckpointError, StorageError
from splitlearn_core.loading.files import SAFETENSORS_SUFFIX, TORCH_SUFFIXES
from splitlearn_core.messages import in_one_line
from splitlearn_core.tensor_writer import TensorSpec, in_file_order, write_tensors
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SavedWeights:
    """What was saved.

    Attributes:
        path: The file, or the folder.
        tensors: Names that are in the file, sorted.
        twins: Names of tied tensors -> the name under which their values are in the file.
        dtype: That of most values, as `float16`.
        nbytes: Length of the weights file.
    """

    path: Path
    tensors: tuple[str, ...]
    twins: Mapping[str, str]
    dtype: str
    nbytes: int


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: Any = None,
) -> SavedWeights:
    """Save a model's weights for inference; a file that is there is replaced when all is written.

    The model is left as it is: in training or not, its dtypes, devices and gradients.  It may be
    wrapped in DDP, FSDP or `torch.compile`; names are those of the model within.  Where FSDP
    shards it every rank must call this, and rank 0 writes.

    Peak memory beside the model: one tensor and 4 Mi elements.  More is needed for a torch file
    (all tensors once more, where they are cast), and at rank 0 with an FSDP1 that was not told to
    `use_orig_params` (the whole state).

    Args:
        model: A part, a chain of parts that are all here, transformers' model, or any module.
        path: `….safetensors` for that file; `….pth`, `….pt` or `….bin` for a plain state dict in
            torch's format; anything else is a folder that `from_pretrained` loads (of a part: one
            that `SplitModel.load` does): `config.json`, `generation_config.json`, the weights.
        dtype: Cast floating-point tensors to this: `float16`, `bfloat16`, …; `None` keeps theirs.
        tokenizer: Saved with a folder, by its own `save_pretrained`.

    Raises:
        CheckpointError: (a `ValueError`) A value is beyond what `dtype` can hold; names it.
        StorageError: (an `OSError`) The disk is full or failed; what was there is as it was.
        PackedWeightsError: (a `RuntimeError`) The weights are packed.
        FileExistsError: The folder holds an adapter or a part, which it would no longer fit.
        ValueError: The model has adapters.
        TypeError: A model that is none of transformers' has no config for a folder.
    """
    target, wanted = user_path(path), as_dtype(dtype)
    is_folder = target.suffix not in {SAFETENSORS_SUFFIX, *TORCH_SUFFIXES}
    if tokenizer is not None and not is_folder:
        raise ValueError(f"a tokenizer goes into a folder; {target} is a file")
    kind = ModelFolder.of(model, target) if is_folder else None
    with state_of(model) as state:
        if kind is not None and kind.is_whole:
            state = _in_checkpoint_names(kind.model, state)  # noqa: PLW2901 - the same, renamed
        return _save(state, target, wanted, kind, tokenizer)


def _save(
    state: ModelState,
    target: Path,
    dtype: torch.dtype | None,
    kind: ModelFolder | None,
    tokenizer: Any,
) -> SavedWeights:
    """Write a state to a file, or to the folder of that kind."""
    specs = _specs(state, dtype)

    def write(read: Read) -> SavedWeights:
        checked, main = _checking(read, specs), _main_dtype(specs)
        with _writing(target):
            if kind is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as file:
                    _write_file(file, target.suffix, state, specs, checked)
                nbytes = target.stat().st_size
            else:
                weights = partial(
                    _write_file, suffix=SAFETENSORS_SUFFIX, state=state, specs=specs, read=checked
                )
                nbytes = write_folder(target, kind, main, weights, tokenizer)
        names = tuple(sorted(specs))
        return SavedWeights(target, names, dict(state.twins), dtype_name(main), nbytes)

    if not state.sharded:
        return write(state.read)
    # where rank 0 has been lent the whole, the others have nothing to give
    return write_together(() if state.lent else in_file_order(specs), state.read, write)


def _specs(state: ModelState, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Return what each tensor is to be in the file."""
    return {
        name: TensorSpec(
            dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
            tuple(tensor.shape),
        )
        for name, tensor in state.tensors.items()
    }


def _main_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """Return the dtype that most values have."""
    found = main_dtype((spec.dtype, math.prod(spec.shape)) for spec in specs.values())
    return found or torch.get_default_dtype()


def _checking(read: Read, specs: Mapping[str, TensorSpec]) -> Read:
    """Return a reader that refuses values which the file's dtype can't hold."""

    def checked(name: str) -> torch.Tensor:
        tensor = read(name)
        wanted = specs[name].dtype
        if tensor.dtype is not wanted and tensor.numel() and wanted.is_floating_point:
            _check_range(name, tensor, wanted)
        return tensor

    return checked


def _check_range(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor with finite values beyond the largest of `dtype`: they would be infinite."""
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(tensor.dtype).max:
        return
    largest = max(abs(float(value)) for value in torch.aminmax(tensor))
    if limit < largest < math.inf:
        raise CheckpointError(
            f"{name} has values up to {largest:.6g}, {dtype_name(dtype)} can hold {limit:.6g}: save"
            " as bfloat16, or leave dtype out"
        )


def _write_file(
    file: Path, suffix: str, state: ModelState, specs: Mapping[str, TensorSpec], read: Read
) -> None:
    """Write all tensors to a new file."""
    if suffix == SAFETENSORS_SUFFIX:
        # the names that are left out, as safetensors' own save_model notes them
        write_tensors(file, specs, read, metadata=state.twins, hashed=False)
        return
    # in the order in which other ranks, if there are any, give them
    held = {name: read(name).to("cpu", specs[name].dtype) for name in in_file_order(specs)}
    tensors = {name: held[name] for name in specs}
    twins = {name: tensors[first] for name, first in state.twins.items()}
    own = {name: tensor.contiguous() for name, tensor in (tensors | twins).items()}
    try:
        torch.save(own, file)
    except RuntimeError as error:  # torch's writer, of a disk that takes no more
        raise OSError(in_one_line(error)) from error


def _in_checkpoint_names(model: PreTrainedModel, state: ModelState) -> ModelState:
    """Return a whole model's state as its published checkpoints have it, where that is another.

    transformers fuses the tensors of single experts when it loads; what reads its folders knows
    them by themselves.  Of a sharded model they stay as they are: transformers reads both.
    """
    if state.sharded:
        return state
    tensors = revert_weight_conversion(model, dict(state.tensors))
    return replace(state, tensors=tensors)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say where it was, when a disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the weights can't be saved to {target}: {in_one_line(error)}; what was there is as it"
            " was.  Make room, or name another place",
            getattr(error, "errno", None),
        ) from error
