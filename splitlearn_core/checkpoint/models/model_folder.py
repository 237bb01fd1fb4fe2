"""A model's folder: the settings that lie beside its weights, written with them or not at all."""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from splitlearn_core.atomic_files import replacing, sync
from splitlearn_core.causal_lm import SplitCausalLM
from splitlearn_core.checkpoint.models.parameters import count_parameters
from splitlearn_core.checkpoint.models.wrappers import unwrapped
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.headers import SINGLE_FILE
from splitlearn_core.loading.files import ADAPTER_CONFIG_FILE
from splitlearn_core.loading.generation import GENERATION_CONFIG_FILE
from splitlearn_core.part_manifest import MANIFEST_FILE, FileRecord, Manifest
from splitlearn_core.shape import CONFIG_FILE
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn
    from transformers import GenerationConfig, PreTrainedConfig


@dataclass(frozen=True)
class ModelFolder:
    """What a folder is to hold.

    Attributes:
        model: transformers' model, whose class and config are the folder's.
        config: The whole model's.
        settings: How it generates; `None` where there is no head, or nothing is said.
        part: The part whose folder it is; `None` where it is a whole model's.
        num_parameters: Of all of it, also where ranks hold shares.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    settings: GenerationConfig | None
    part: SplitModel | None
    num_parameters: int

    @property
    def is_whole(self) -> bool:
        """Whether it is a folder as transformers has them."""
        return self.part is None

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> ModelFolder:
        """Return what `folder` is to hold for a model, which may be wrapped.

        Raises:
            TypeError: The model is none of transformers'.
            FileExistsError: What lies in the folder would no longer fit.
        """
        within = unwrapped(model)
        part = within if isinstance(within, SplitModel) else None
        if isinstance(within, SplitCausalLM):
            inner: Any = unwrapped(within.top.model)
        else:
            inner = within if part is None else unwrapped(part.model)
        if not isinstance(inner, PreTrainedModel):
            raise TypeError(
                f"{type(inner).__name__} is none of transformers' models, so it has no config for a"
                f" folder; name a file instead: {folder}.safetensors"
            )
        is_whole = part is None or (part.spec.is_first and part.spec.is_last)
        _check_free(folder, is_whole=is_whole)
        has_head = part is None or part.spec.is_last
        source = within if isinstance(within, SplitCausalLM) else inner
        settings = getattr(source, "generation_config", None) if has_head else None
        number = count_parameters(model).total
        return cls(inner, inner.config, settings, None if is_whole else part, number)


def _check_free(folder: Path, *, is_whole: bool) -> None:
    """Refuse to write where other things lie that would be taken for a part of it."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"{folder} is a file; name a folder, or a file that ends .safetensors"
        )
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise FileExistsError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_FILE}), with which transformers would load"
            " a model that is saved there; name another folder"
        )
    if is_whole and (folder / MANIFEST_FILE).exists():
        raise FileExistsError(
            f"{folder} holds a part of a model ({MANIFEST_FILE}); name another folder"
        )


def write_folder(
    folder: Path,
    kind: ModelFolder,
    dtype: torch.dtype,
    write_weights: Callable[[Path], None],
    tokenizer: Any = None,
) -> int:
    """Write settings and weights; old files are replaced when all new ones are on the disk.

    Args:
        folder: Made where it is not there.
        kind: What it is to hold.
        dtype: Of most of the weights; the config names it.
        write_weights: Writes the weights to the path that it is given.
        tokenizer: Writes its own files, if there is one.

    Returns:
        Length of the weights file in bytes.

    Raises:
        OSError: The disk is full or failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {CONFIG_FILE: _config_text(kind, dtype)}
    if kind.settings is not None:
        texts[GENERATION_CONFIG_FILE] = kind.settings.to_json_string()
    with ExitStack() as last_first:
        manifest = (
            last_first.enter_context(replacing(folder / MANIFEST_FILE)) if kind.part else None
        )
        new = {name: last_first.enter_context(replacing(folder / name)) for name in texts}
        weights = last_first.enter_context(replacing(folder / SINGLE_FILE))
        for name, text in texts.items():
            new[name].write_text(text, encoding="utf-8")
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder, last_first)
        write_weights(weights)
        if kind.part is not None and manifest is not None:
            records = {name: FileRecord.of(file) for name, file in new.items()}
            records[SINGLE_FILE] = FileRecord.of(weights)
            manifest.write_text(_manifest(kind, kind.part, dtype, records), encoding="utf-8")
            sync(manifest)
        for file in (*new.values(), weights):
            sync(file)  # whatever the disk refuses it refuses now, before the first is replaced
        if kind.part is not None:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
        return weights.stat().st_size


def _config_text(kind: ModelFolder, dtype: torch.dtype) -> str:
    """Return the text of the config, with the dtype of the weights beside it."""
    config = copy.deepcopy(kind.config)
    config.dtype = dtype_name(dtype)
    if kind.is_whole:
        config.architectures = [architecture_of(kind.model)]
    return str(config.to_json_string(use_diff=kind.is_whole))


def architecture_of(model: PreTrainedModel) -> str:
    """Return the name of a model's own class: FSDP2 puts one of its own making before it."""
    made = type(model).__mro__
    return next(kind.__name__ for kind in made if not issubclass(kind, FSDPModule))


def _save_tokenizer(tokenizer: Any, folder: Path, last_first: ExitStack) -> None:
    """Let a tokenizer write its files beside, and have them moved in with the others."""
    staging = last_first.enter_context(
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    )
    tokenizer.save_pretrained(staging)
    for path in sorted(Path(staging).iterdir()):
        place = last_first.enter_context(replacing(folder / path.name))
        path.replace(place)


def _manifest(
    kind: ModelFolder, part: SplitModel, dtype: torch.dtype, files: dict[str, FileRecord]
) -> str:
    """Return the text of a part's manifest."""
    return Manifest(
        spec=part.spec,
        model_type=part.config.model_type,
        num_layers=part.num_layers,
        num_parameters=kind.num_parameters,
        dtype=dtype_name(dtype),
        files=files,
    ).to_json()
