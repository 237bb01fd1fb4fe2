"""An adapter on disk: peft's folder, or the file that MiniMind's scripts write.

`adapter_config.json` and `adapter_model.safetensors`, tensors by the whole model's names:
`base_model.model.{module}.lora_A.weight` [rank, in] and `….lora_B.weight` [out, rank].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.atomic_files import replacing, sync
from splitlearn_core.checkpoint.minimind import hugging_face_name
from splitlearn_core.checkpoint.models.plain_names import plain_names
from splitlearn_core.checkpoint.models.weights_file import open_weights
from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.headers import listed
from splitlearn_core.loading.files import ADAPTER_CONFIG_FILE, TORCH_SUFFIXES, FolderFiles
from splitlearn_core.messages import short
from splitlearn_core.shape import read_config
from splitlearn_core.tensor_writer import TensorSpec, write_tensors
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os

    import torch

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_BIN_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>embedding_[AB]|[AB])(\.weight)?")
_MINIMIND = re.compile(r"(?P<module>.+)\.lora\.(?P<side>[AB])\.weight")
# What changes more than the two factors, or something else than modules of the model.
_BEYOND = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "single token embeddings",
    "target_parameters": "single parameters, as those of fused experts",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "invocation tokens",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal factors",
}
# These begin with a changed base, which no file beside it holds.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_residual")


@dataclass(frozen=True)
class Factors:
    """The two factors of one module's change, which is scale * B @ A.

    Attributes:
        a: [rank, in].
        b: [out, rank].
        is_embedding: Whether the module is a table: A is then [rank, rows].
        names: What the tensors are called in their file.
        old_rope: Whether rows of B go with rope over neighbouring pairs (MiniMind's first files).
    """

    a: torch.Tensor
    b: torch.Tensor
    is_embedding: bool = False
    names: tuple[str, str] = ("lora_A", "lora_B")
    old_rope: bool = False

    @property
    def rank(self) -> int:
        """Width between the factors."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk.

    Attributes:
        path: The file that holds the tensors.
        settings: peft's, as `adapter_config.json` has them.
        factors: The whole model's module -> its factors.
    """

    path: str
    settings: Mapping[str, Any]
    factors: Mapping[str, Factors] = field(default_factory=dict)


def read_adapter(path: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter.

    Args:
        path: peft's folder, or a `.pth` file of MiniMind's `save_lora`, which has no settings: the
            rank is that of its tensors, and the scale 1.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no adapter.
        CheckpointError: (a `ValueError`) It is damaged, or no LoRA of the plain kind.
    """
    place = user_path(path)
    if place.is_file() and place.suffix in TORCH_SUFFIXES:
        return _minimind(place)
    files = FolderFiles(place)
    config = files.find(ADAPTER_CONFIG_FILE) if place.is_dir() else None
    if config is None:
        raise ModelSourceError(f"there is no adapter at {place}: no {ADAPTER_CONFIG_FILE} is there")
    settings = read_config(config)
    _check_settings(settings, str(config))
    file = next((n for n in (ADAPTER_FILE, ADAPTER_BIN_FILE) if files.find(n) is not None), None)
    if file is None:
        raise ModelSourceError(f"{place} has {ADAPTER_CONFIG_FILE}, but no {ADAPTER_FILE}")
    tensors = _tensors(place / file)
    found = _factors({n.removeprefix(PREFIX): t for n, t in tensors.items()}, _TENSOR, place / file)
    return StoredAdapter(str(place / file), settings, found)


def _minimind(path: Path) -> StoredAdapter:
    """Read what MiniMind's `save_lora` writes."""
    tensors = _tensors(path)
    found = _factors(tensors, _MINIMIND, path)
    renamed = {
        hugging_face_name(f"{module}.weight").removesuffix(".weight"): factors
        for module, factors in found.items()
    }
    ranks = {factors.rank for factors in found.values()}
    if len(ranks) != 1:
        raise CheckpointError(f"{path} has factors of several ranks, {sorted(ranks)}, or none")
    rank = ranks.pop()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    return StoredAdapter(str(path), settings, renamed)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file's tensors by their plain names."""
    with closing(open_weights(path)) as source:
        return {plain: source.read(own) for own, plain in plain_names(source.names()).items()}


def _factors(
    tensors: Mapping[str, torch.Tensor], pattern: re.Pattern[str], path: Path
) -> dict[str, Factors]:
    """Put the factors of each module together."""
    sides: dict[str, dict[str, str]] = {}
    for name in tensors:
        found = pattern.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{path} has {name}, which is no factor of a LoRA adapter")
        sides.setdefault(found["module"], {})[found["side"]] = name
    factors = {}
    for module, names in sides.items():
        is_embedding = any(side.startswith("embedding") for side in names)
        wanted = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        if set(names) != set(wanted):
            raise CheckpointError(f"{path} has only {listed(names.values())} of {module}")
        a, b = (tensors[names[side]] for side in wanted)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:  # noqa: PLR2004
            raise CheckpointError(
                f"{path}: {names[wanted[0]]} {list(a.shape)} and {names[wanted[1]]}"
                f" {list(b.shape)} have no rank in common"
            )
        old = pattern is _MINIMIND and hugging_face_name(f"{module}.weight") != f"{module}.weight"
        stored = (names[wanted[0]], names[wanted[1]])
        factors[module] = Factors(a, b, is_embedding, stored, old_rope=old)
    return factors


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that is more than two factors for each module."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} is of a {short(kind)} adapter; LORA can be loaded here")
    if not isinstance(settings.get("r"), int) or not isinstance(
        settings.get("lora_alpha"), int | float
    ):
        raise CheckpointError(f"{where} lacks r and lora_alpha, or has no numbers for them")
    beyond = [what for key, what in _BEYOND.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        beyond.append("biases of the model")
    start = str(settings.get("init_lora_weights", ""))
    if start.lower().startswith(_CHANGES_BASE):
        beyond.append(f"a base that {start} changed")
    if beyond:
        raise CheckpointError(
            f"{where} asks for {', '.join(beyond)}: plain LoRA can be loaded here; load it with"
            " peft, and merge it (merge_and_unload)"
        )


def write_adapter(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write peft's folder; what was there is replaced when both files are on the disk.

    Raises:
        OSError: The disk is full or failed; what was there is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ExitStack() as last_first:
        config = last_first.enter_context(replacing(folder / ADAPTER_CONFIG_FILE))
        weights = last_first.enter_context(replacing(folder / ADAPTER_FILE))
        config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        write_tensors(weights, specs, tensors.__getitem__, hashed=False)
        sync(config)


def join_adapters(
    folders: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> StoredAdapter:
    """Put the adapters of a model's parts together, as one of the whole model.

    Args:
        folders: peft's folders, as `save_lora` writes them of parts.
        out: Where the joined one goes.

    Raises:
        CheckpointError: (a `ValueError`) Two have the same module, or they differ in what must be
            the same for all: scale, dropout.
        ValueError: There are none.
    """
    adapters = [read_adapter(folder) for folder in folders]
    if not adapters:
        raise ValueError("there are no adapters to join")
    first = adapters[0]
    seen: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        if differing := _differing(first.settings, adapter.settings):
            raise CheckpointError(
                f"{first.path} and {adapter.path} are no parts of one adapter: they differ in"
                f" {listed(differing)}"
            )
        for module, factors in adapter.factors.items():
            other = seen.setdefault(module, adapter.path)
            if other != adapter.path:
                raise CheckpointError(f"{other} and {adapter.path} both have {module}")
            tensors |= named(module, factors)
    settings = {**first.settings, "target_modules": sorted(seen)}
    write_adapter(user_path(out), settings, tensors)
    return read_adapter(out)


def named(module: str, factors: Factors) -> dict[str, torch.Tensor]:
    """Return a module's factors by the names that peft's files have."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if factors.is_embedding else ("A", "B")
    if not factors.is_embedding:
        a, b = f"lora_{a}.weight", f"lora_{b}.weight"
    return {f"{PREFIX}{module}.{a}": factors.a, f"{PREFIX}{module}.{b}": factors.b}


def folding_nbytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes that `fold_lora` takes beside the model, at most.

    That is the adapter, in float32 as it is computed with, and the largest module's change three
    times: as it is made, cast, and added to.
    """
    factors = read_adapter(path).factors.values()
    own = sum(4 * (f.a.numel() + f.b.numel()) for f in factors)
    return own + 3 * max((4 * f.a.shape[1] * f.b.shape[0] for f in factors), default=0)


_OF_ALL = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the settings that two parts' adapters must share, and do not."""
    return [key for key in _OF_ALL if ours.get(key) != theirs.get(key)]
