"""The unsplit model without its weights: Hugging Face's own class, built on the meta device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from splitlearn_core.default_dtype import own_default_dtype
from splitlearn_core.errors import CheckpointError
from splitlearn_core.families import family_of
from splitlearn_core.messages import in_one_line
from splitlearn_core.packed_linear import weights_shown
from splitlearn_core.shape import CONFIG_FILE, read_shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from splitlearn_core.shape import FindFamily, ModelShape

# transformers swaps functions of torch.nn.init for guarded ones while it builds or initialises a
# model.  Two threads doing so at once can leave the swap behind, so this library does it one at a
# time.  Nothing slow may be done under the lock: no reading of weights.
building = threading.RLock()

# Tables that no checkpoint stores are computed from sizes in a config; the largest of known
# architectures take some MB.
MAX_TABLE_BYTES = 2**30

_GUEST = "guest"


@contextmanager
def _visiting(model: nn.Module, guests: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have other modules in the model, below what stands in their places."""
    for path, guest in guests.items():
        model.get_submodule(path).add_module(_GUEST, guest)
    try:
        yield
    finally:
        for path in guests:
            delattr(model.get_submodule(path), _GUEST)


def load_config(folder: Path, find_family: FindFamily = family_of) -> PreTrainedConfig:
    """Read the Hugging Face config in `folder`, never running code that lies beside it.

    Args:
        folder: Holds `config.json`.
        find_family: Knows the architectures that are let in.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) No `config.json` is there.
        CheckpointError: (a `ValueError`) The config is damaged or asks for code of its own.
        UnsupportedModelError: (a `KeyError`) The architecture is not known.
    """
    path = folder / CONFIG_FILE
    return _config(
        read_shape(folder, find_family),
        lambda: AutoConfig.from_pretrained(path, local_files_only=True),
        str(path),
    )


def make_config(
    fields: dict[str, Any], where: str, find_family: FindFamily = family_of
) -> PreTrainedConfig:
    """Return the config that a `config.json` of these fields would be; otherwise `load_config`.

    Args:
        fields: With `model_type`.
        where: Names their origin in errors.
        find_family: Knows the architectures that are let in.
    """
    kinds: Any = CONFIG_MAPPING
    return _config(
        shape_of(fields, where, find_family),
        lambda: kinds[fields["model_type"]].from_dict(fields),
        where,
    )


def _config(
    shape: ModelShape, make: Callable[[], PreTrainedConfig], where: str
) -> PreTrainedConfig:
    """Make a config, and compare it with the shape that was read without transformers."""
    try:
        config = make()
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
    except Exception as error:
        # each architecture checks its own fields, and raises what it likes
        raise CheckpointError(f"{where} makes no sense: {in_one_line(error)}") from error
    if num_layers != shape.num_layers:
        raise CheckpointError(
            f"{where} names {shape.num_layers} layers, and others from which transformers makes"
            f" {num_layers}"
        )
    return config


def build_skeleton(
    config: PreTrainedConfig,
    checkpoint: str = "the config",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build the whole `…ForCausalLM` of `config` on the meta device: no memory for any weight.

    Every parameter and buffer has the dtype that transformers builds it with, but for what an
    architecture keeps in float32 (see `loading/precision.py`).  Forwards of other threads notice
    nothing.

    Args:
        config: The whole model's; gets the dtype.
        checkpoint: Names its origin in errors.
        dtype: Of whatever no module says otherwise of.

    Raises:
        CheckpointError: (a `ValueError`) No model can be built of the config.
    """
    try:
        with building, own_default_dtype(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        # sizes that don't go together are noticed by whichever line first trips over them
        raise CheckpointError(
            f"{checkpoint}: no model can be built from {CONFIG_FILE}: {in_one_line(error)}"
        ) from error
    model.eval()
    return model


def computed_tables(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the buffers that no checkpoint stores: they are computed from the config."""
    stored = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name not in stored]


def check_tables(model: PreTrainedModel, checkpoint: str) -> None:
    """Refuse a model on meta whose computed tables would take more memory than any model's do.

    Raises:
        CheckpointError: (a `ValueError`) They would; says how much.
    """
    nbytes = sum(table.nbytes for table in computed_tables(model))
    if nbytes > MAX_TABLE_BYTES:
        raise CheckpointError(
            f"{checkpoint}: tables of the sizes in {CONFIG_FILE} would take {nbytes:,} bytes, the"
            f" limit is {MAX_TABLE_BYTES:,}"
        )


def initialise_buffers(
    model: PreTrainedModel, device: torch.device, guests: Mapping[str, nn.Module] | None = None
) -> None:
    """Give the buffers that no checkpoint stores (rotary tables, …) their values on `device`.

    The architecture's own `_init_weights` computes them; everything that was loaded is marked, so
    that it is left alone.  (A few architectures set the padding row of a loaded table to zero all
    the same.)

    Args:
        model: Its weights are loaded.
        device: Where the buffers go.
        guests: Modules that are treated as if they were in the model, by their paths there.
    """
    with building, torch.no_grad(), _visiting(model, guests or {}), weights_shown(model):
        loaded = [*model.parameters(), *(b for b in model.buffers() if not b.is_meta)]
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    module.register_buffer(name, torch.empty_like(buffer, device=device), False)
        for tensor in loaded:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
        for module in model.modules():
            if hasattr(module, "_is_hf_initialized"):
                del module._is_hf_initialized  # noqa: SLF001 - see above
        model.initialize_weights()
