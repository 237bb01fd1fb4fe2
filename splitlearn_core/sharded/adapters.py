"""LoRA adapters (peft) on a sharded model: put on before it is sharded, saved in peft's own form.

Adapters that are put on afterwards would not be sharded: each rank would train other ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from splitlearn_core.atomic_files import replacing
from splitlearn_core.checkpoint.models.wrappers import unwrapped
from splitlearn_core.errors import CheckpointError, ModelSourceError, StorageError
from splitlearn_core.headers import listed, read_header
from splitlearn_core.loading.files import ADAPTER_CONFIG_FILE, FolderFiles
from splitlearn_core.messages import in_one_line
from splitlearn_core.sharded.gathering import full_tensors
from splitlearn_core.split_model import SplitModel
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
NAME = "default"

_PEFT_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True)
class Adapter:
    """An adapter to put on.

    Attributes:
        config: peft's.
        values: Of a trained one, by peft's names; `None`: it begins as peft has it begin.
        seed: Of the random numbers that a new one begins with, the same on every rank.
    """

    config: PeftConfig
    values: Mapping[str, torch.Tensor] | None
    seed: int

    @classmethod
    def of(cls, adapter: Any, seed: int) -> Adapter | None:
        """Take what a user gives: peft's config, the folder of a trained adapter, or `None`.

        Raises:
            ModelSourceError: (a `FileNotFoundError`) There is no adapter in the folder.
            CheckpointError: (a `ValueError`) It is damaged.
        """
        if adapter is None:
            return None
        if not isinstance(adapter, (str, os.PathLike)):
            return cls(adapter, None, seed)
        folder = user_path(adapter)
        config, values = _read(folder)
        return cls(config, values, seed)

    def facts(self) -> dict[str, Any]:
        """Return what all ranks must have been given alike."""
        said = json.dumps(self.config.to_dict(), default=_plain, sort_keys=True)
        digest = hashlib.sha256(said.encode())
        for name, values in sorted((self.values or {}).items()):
            digest.update(name.encode())
            digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        return {"adapter": digest.hexdigest()[:16], "adapter_seed": self.seed}

    def put_on(self, model: PreTrainedModel) -> None:
        """Put the adapter on a model on meta; it gets its values, whole, on the CPU.

        Raises:
            ValueError: peft can't put it there: no module has such a name.
            CheckpointError: (a `ValueError`) The model has a place for a tensor that the folder
                lacks, or the other way round within the model's own layers.
        """
        import peft  # noqa: PLC0415 - an extra, and slow
        from peft.tuners.lora import LoraLayer  # noqa: PLC0415

        peft.inject_adapter_in_model(self.config, model, adapter_name=NAME, low_cpu_mem_usage=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    self._begin(layer)
        if self.values is not None:
            self._fill(model, self.values)

    def _begin(self, layer: Any) -> None:
        """Give one layer's adapter the values that peft has it begin with."""
        for attribute in layer.adapter_layer_names:
            held: Any = getattr(layer, attribute)
            if NAME not in held:
                continue
            if isinstance(held, nn.ParameterDict):
                empty = torch.empty_like(held[NAME], device="cpu")
                held[NAME] = nn.Parameter(empty, held[NAME].requires_grad)
            else:
                held[NAME].to_empty(device="cpu")
        how: Any = getattr(self.config, "init_lora_weights", True)
        layer.reset_lora_parameters(NAME, how)

    @staticmethod
    def _fill(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Put trained values in their places."""
        places = {_peft_name(n): p for n, p in model.named_parameters() if is_adapters(n)}
        if missing := places.keys() - values.keys():
            raise CheckpointError(f"the adapter lacks tensors that are needed: {listed(missing)}")
        with torch.no_grad():
            for name, place in places.items():
                if place.shape != values[name].shape:
                    raise CheckpointError(
                        f"{name} of the adapter is {list(values[name].shape)}, the model needs"
                        f" {list(place.shape)}"
                    )
                place.copy_(values[name])


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save the adapter of a sharded model as peft's own folder, which peft loads onto any.

    Every rank calls it; rank 0 writes.

    Args:
        model: From `load_sharded` with `adapter`.
        folder: Written to, its files each replaced when they are complete.

    Raises:
        ValueError: The model has no adapter.
        StorageError: (an `OSError`) The folder can't be written.
    """
    part = unwrapped(model)
    inner: Any = part.model if isinstance(part, SplitModel) else part
    config = getattr(unwrapped(inner), "peft_config", {}).get(NAME)
    if config is None:
        raise ValueError("this model has no adapter: load it with `adapter=` to give it one")
    names = [name for name in _parameters(model) if is_adapters(name)]
    gathered = {name: t for name, t in full_tensors(model, names) if t is not None}
    if not gathered:
        return  # another rank writes
    target = user_path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / ADAPTER_FILE) as file:
            save_file({_peft_name(n): t.contiguous() for n, t in gathered.items()}, file)
        with replacing(target / ADAPTER_CONFIG_FILE) as file:
            said = json.dumps(config.to_dict(), default=_plain, indent=2, sort_keys=True)
            file.write_text(said, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the adapter can't be saved in {target}: {in_one_line(error)}",
            getattr(error, "errno", None),
        ) from error


def is_adapters(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return f".{NAME}" in name and "lora_" in name


def base_name(name: str) -> str:
    """Return the name that a parameter had before an adapter was put around its layer."""
    return name.replace(_BASE_LAYER, ".")


def _parameters(model: nn.Module) -> list[str]:
    """Return the names of a sharded model's parameters, the same on every rank."""
    from splitlearn_core.sharded.layout import shares  # noqa: PLC0415 - only here

    return [share.name for share in shares(model)]


def _peft_name(name: str) -> str:
    """Return what peft calls an adapter's tensor in its file."""
    return _PEFT_PREFIX + name.replace(f".{NAME}", "")


def _read(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Read the folder of a trained adapter; nothing in it is run."""
    from peft import PeftConfig  # noqa: PLC0415 - an extra, and slow

    files = FolderFiles(folder)
    found, weights = files.find(ADAPTER_CONFIG_FILE), files.find(ADAPTER_FILE)
    if found is None or weights is None:
        raise ModelSourceError(
            f"no adapter in {folder}: it needs {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}"
        )
    read_header(weights)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
        return config, load_file(weights)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} can't be read: {in_one_line(error)}") from error


def _plain(value: Any) -> Any:
    """Return what JSON has no form for as one that it has."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
