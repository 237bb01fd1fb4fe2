"""The shell of a part: its modules on the meta device, ready to be sharded.

Only what is not sharded has memory: buffers that no checkpoint stores, which are computed here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig

from splitlearn_core.checkpoint.models.wrappers import plain_name
from splitlearn_core.families import family_of
from splitlearn_core.pruning import AbsentModule, prune
from splitlearn_core.skeleton import build_skeleton, building, initialise_buffers
from splitlearn_core.split_model import SplitModel
from splitlearn_core.uncertified import any_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.sharded.outline import Outline

PART_PREFIX = "model."
"""What a part's own tensors' names begin with, before Hugging Face's."""


@dataclass(frozen=True)
class Shell:
    """A part on the meta device.

    Attributes:
        root: What is handed out in the end: a `SplitModel`, or for the whole transformers' model.
        model: transformers' model, whose names the tensors have.
        family: How the architecture is built.
        outline: What it was built from.
    """

    root: nn.Module
    model: PreTrainedModel
    family: Family
    outline: Outline

    @property
    def layers(self) -> list[nn.Module]:
        """The part's own decoder layers."""
        spec = self.outline.spec
        every: Any = self.model.get_submodule(self.family.layers)
        return list(every[spec.start_layer : spec.end_layer])

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the persistent buffers, which every rank has whole, by name; wrapped or not."""
        named = ((plain_name(name), buffer) for name, buffer in self.model.named_buffers())
        return {name: buffer for name, buffer in named if name in self.outline.tensors}


def build_shell(outline: Outline, device: torch.device) -> Shell:
    """Build the shell of a part.

    Args:
        outline: Of the part.
        device: Where buffers go.

    Raises:
        CheckpointError: (a `ValueError`) No model can be built of the config.
    """
    spec = outline.spec
    made: Any = CONFIG_MAPPING[outline.model_type]
    # JSON has no infinities; transformers writes and reads them so
    fields = made._decode_special_floats(json.loads(outline.config))  # noqa: SLF001
    config = made.from_dict(fields)
    built_as: torch.dtype = getattr(torch, outline.built_as)
    model = build_skeleton(config, outline.checkpoint, built_as)
    family = (any_family if outline.uncertified else family_of)(outline.model_type)
    passage = prune(model, family, spec)
    _set_tensors(model, outline)
    _make_buffers(model, outline, device)
    initialise_buffers(model, device)
    model.config.dtype = outline.dtype
    if outline.generation_config is not None:
        settings: Any = GenerationConfig
        model.generation_config = settings.from_dict(json.loads(outline.generation_config))
    whole = spec.is_first and spec.is_last
    root = model if whole else SplitModel(model, spec, family, passage)
    return Shell(root, model, family, outline)


def zeroed_rows(shell: Shell) -> dict[str, int]:
    """Return the rows that the architecture sets to zero whatever a checkpoint has there.

    A few do so with the row of the padding token, when weights are initialised around those that
    were loaded.  Whether one does shows on a table of the same length that has one column.

    Returns:
        Name of the table -> number of the row.
    """
    found: dict[str, int] = {}
    for name, table in _padded_tables(shell):
        row = table.padding_idx
        stand_in = copy.copy(table)
        weight = nn.Parameter(torch.ones(table.num_embeddings, 1), requires_grad=False)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001 - loaded
        stand_in._parameters = {"weight": weight}  # noqa: SLF001 - of the copy
        with building, torch.no_grad():
            shell.model._init_weights(stand_in)  # noqa: SLF001 - the architecture's own rule
        if row is not None and not weight[row].any():
            found[name] = row
    return found


def _padded_tables(shell: Shell) -> Iterator[tuple[str, Any]]:
    """Yield the embeddings with a padding row, by the name that their weight has in this part."""
    ours = shell.outline.tensors
    origins = shell.model.all_tied_weights_keys
    for path, module in shell.model.named_modules():
        table = module.real if isinstance(module, AbsentModule) else module
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            name = f"{path}.weight"
            twins = [target for target, origin in origins.items() if origin == name]
            yield from ((n, table) for n in [name, *twins] if n in ours)


def _set_tensors(model: PreTrainedModel, outline: Outline) -> None:
    """Give every parameter its final dtype, and tied ones one object; all stay on meta."""
    made: dict[str, nn.Parameter] = {}
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        origin = outline.ties.get(name, name)
        if origin not in made:
            wanted = outline.tensors[origin]
            dtype: torch.dtype = getattr(torch, wanted.dtype)
            empty = torch.empty(wanted.shape, dtype=dtype, device="meta")
            made[origin] = nn.Parameter(empty, requires_grad=dtype.is_floating_point)
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._parameters[last] = made[origin]  # noqa: SLF001 - as it is loaded


def _make_buffers(model: PreTrainedModel, outline: Outline, device: torch.device) -> None:
    """Give the persistent buffers memory, for values to come."""
    for path, module in model.named_modules():
        for last, _ in list(module.named_buffers(recurse=False)):
            wanted = outline.tensors.get(f"{path}.{last}" if path else last)
            if wanted is not None:
                dtype: torch.dtype = getattr(torch, wanted.dtype)
                empty = torch.empty(wanted.shape, dtype=dtype, device=device)
                module._buffers[last] = empty  # noqa: SLF001 - as it is loaded
