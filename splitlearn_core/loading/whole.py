"""The traditional source of tensors: the whole model, loaded first by transformers itself."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import TYPE_CHECKING, Any

from splitlearn_core.builder import draw
from splitlearn_core.default_dtype import own_default_dtype
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.loading.generation import read_generation_config
from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_source import fetch_whole
from splitlearn_core.loading.opening import open_source
from splitlearn_core.loading.sources import StateDictSource
from splitlearn_core.messages import in_one_line
from splitlearn_core.plan import FULL, SplitPlan
from splitlearn_core.skeleton import building

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.loading.files import CheckpointFiles


def open_whole_model(
    files: CheckpointFiles,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    family: Family | None = None,
) -> StateDictSource:
    """Load the unsplit model on the CPU and offer its tensors.

    Parts built from it share its memory, so that the peak is the whole model, once; where nothing
    is cast, that is mapped memory.

    Raises:
        CheckpointError: (a `ValueError`) Tensors are missing, of the wrong shape or kind, or
            strangers, where transformers would go on without, or with random ones.
    """
    model = _load(files, config, dtype, family)
    return StateDictSource(model.state_dict(), files.description, as_dtype(model.config.dtype))


def load_whole_model(
    files: CheckpointFiles,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    family: Family | None = None,
) -> PreTrainedModel:
    """Load the unsplit `…ForCausalLM` of `files` as transformers does, but strictly.

    Raises:
        CheckpointError: (a `ValueError`) As `open_whole_model`; or the generation config is
            damaged.
    """
    if isinstance(files, HubFiles):
        files = fetch_whole(files)
    settings = read_generation_config(files)
    model = _load(files, config, dtype, family)
    model.generation_config = settings
    return model


def _load(
    files: CheckpointFiles,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    family: Family | None,
) -> PreTrainedModel:
    """Let transformers make the model of tensors that this library has read.

    Of a folder transformers would read more than the checkpoint: adapters, shards of other
    layouts, whatever files a config names.
    """
    if isinstance(files, HubFiles):
        files = fetch_whole(files)
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    spec = SplitPlan.whole(num_layers).component(FULL)
    with closing(open_source(files)) as source:
        blueprint = draw(config, spec, source, files.description, family, dtype)
        tensors = {name: source.read(name) for name in source.names()}
    try:
        with building, own_default_dtype():
            loaded: Any = type(blueprint.model).from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=tensors,
                dtype=blueprint.reads.dtype,
                output_loading_info=True,
            )
    except Exception as error:
        # conversions raise whatever a tensor that does not fit leads to
        raise CheckpointError(
            f"{files.description} can't be loaded: {in_one_line(error)}"
        ) from error
    model: PreTrainedModel
    model, report = loaded
    _check_report(report, files.description)
    model.config.name_or_path = config.name_or_path
    model.eval()
    return model


def _check_report(report: dict[str, object], where: str) -> None:
    """Turn what transformers only warns of into an error."""
    for key, what in (("missing_keys", "lacks tensors"), ("mismatched_keys", "has misfits")):
        names = report.get(key)
        if isinstance(names, (set, list, tuple)) and names:
            raise CheckpointError(f"{where} {what} that are needed: {listed(map(str, names))}")
