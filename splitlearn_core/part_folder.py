"""A part on disk: `config.json`, `model.safetensors`, and `splitlearn.json`, the manifest.

A part with the head has `generation_config.json` as well.

The config is the whole model's; the tensors have the names that the whole model's have, or its
checkpoint's; the manifest says which part this is, and holds the other files' SHA-256.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from splitlearn_core.adapter_layers import refuse_adapters
from splitlearn_core.builder import build_part
from splitlearn_core.devices import check_device
from splitlearn_core.dtypes import as_dtype, dtype_name
from splitlearn_core.errors import CheckpointError, StorageError
from splitlearn_core.families import family_of
from splitlearn_core.headers import SINGLE_FILE
from splitlearn_core.loading.files import TORCH_SUFFIXES, FolderFiles
from splitlearn_core.loading.generation import GENERATION_CONFIG_FILE, generation_config_for
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.sources import SafetensorsSource
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.part_manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    check_hash,
    read_manifest,
)
from splitlearn_core.shape import CONFIG_FILE
from splitlearn_core.skeleton import load_config
from splitlearn_core.uncertified import any_family
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from splitlearn_core.split_model import SplitModel


def save_part(part: SplitModel, path: str | os.PathLike[str]) -> None:
    """Write `part` as a folder, see `SplitModel.save`; `…/trunk.pt` means the folder `…/trunk`."""
    refuse_adapters(part)
    folder = part_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder), ExitStack() as last_first:
        manifest = last_first.enter_context(_replacing(folder / MANIFEST_FILE))
        files = {n: last_first.enter_context(_replacing(folder / n)) for n in _names(part)}
        _write_files(part, files)
        records = {name: FileRecord.of(file) for name, file in files.items()}
        manifest.write_text(_manifest(part, records).to_json(), encoding="utf-8")
        (folder / MANIFEST_FILE).unlink(missing_ok=True)


def _names(part: SplitModel) -> list[str]:
    """Return the files that a part is saved in, beside the manifest."""
    has_settings = part.spec.is_last and getattr(part.model, "generation_config", None) is not None
    return [CONFIG_FILE, *([GENERATION_CONFIG_FILE] if has_settings else []), SINGLE_FILE]


def _write_files(part: SplitModel, places: Mapping[str, Path]) -> None:
    """Write a part's files, each to its place."""
    config = part.config.to_json_string(use_diff=False)
    places[CONFIG_FILE].write_text(config, encoding="utf-8")
    if GENERATION_CONFIG_FILE in places:
        settings: Any = part.model.generation_config
        places[GENERATION_CONFIG_FILE].write_text(settings.to_json_string(), encoding="utf-8")
    save_file(_distinct_tensors(part), places[SINGLE_FILE], metadata={"format": "pt"})


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say where it was, when a disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the part can't be saved in {folder}: {in_one_line(error)}; what was there is as it"
            " was.  Make room, or name another folder",
            getattr(error, "errno", None),
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a part's manifest; it comes last, so that a folder that has one is complete."""
    with _replacing(folder / MANIFEST_FILE) as file:
        file.write_text(manifest.to_json(), encoding="utf-8")


def load_part(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    verify_hashes: bool = False,
    allow_uncertified: bool = False,
) -> SplitModel:
    """Load what `save_part` wrote, see `SplitModel.load`.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) No part lies there.
        CheckpointError: (a `ValueError`) The folder is damaged, or a file is not the one that the
            manifest was written for.
    """
    folder = _saved_folder(path)
    placement = Placement(check_device(device), as_dtype(dtype))
    manifest = check_part(folder) if verify_hashes else read_manifest(folder)
    find_family = any_family if allow_uncertified else family_of
    config = load_config(folder, find_family)
    _check_model(manifest, config, folder)
    settings = generation_config_for(manifest.spec, FolderFiles(folder))
    with closing(SafetensorsSource.of(FolderFiles(folder))) as source:
        part = build_part(
            config,
            manifest.spec,
            source,
            placement,
            checkpoint=str(folder),
            family=find_family(config.model_type),
        )
    if settings is not None:
        part.model.generation_config = settings
    _check_weights(manifest, part, placement, folder)
    return part


def check_part(path: str | os.PathLike[str]) -> Manifest:
    """Read every file of a saved part through, and compare it with the manifest.

    Args:
        path: As in `SplitModel.load`.

    Returns:
        The manifest.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) No part lies there.
        CheckpointError: (a `ValueError`) A file is not the one that the manifest was written for;
            names it, with both hashes.
    """
    folder = _saved_folder(path)
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        check_hash(folder / name, record)
    return manifest


def part_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that `path` means: itself, or for `…/trunk.pt` the folder `…/trunk`."""
    folder = user_path(path)
    return folder.with_suffix("") if folder.suffix in TORCH_SUFFIXES else folder


def _saved_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a saved part that `path` means.

    Raises:
        CheckpointError: (a `ValueError`) `…/trunk.pt` is a part's folder, and `…/trunk` another's.
    """
    named, meant = user_path(path), part_folder(path)
    if named == meant or not (named / MANIFEST_FILE).is_file():
        return meant
    if (meant / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"{named} and {meant} both hold a saved part, and {named.name} may mean either: rename"
            " one of them"
        )
    return named


def _check_model(manifest: Manifest, config: PreTrainedConfig, folder: Path) -> None:
    """Compare what the manifest says of the whole model with the config."""
    said = (manifest.model_type, manifest.num_layers)
    found = (config.model_type, config.get_text_config(decoder=True).num_hidden_layers)
    if said != found:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} is of a {short(said[0])} with {said[1]} layers,"
            f" {CONFIG_FILE} beside it of a {found[0]} with {found[1]}"
        )


def _check_weights(
    manifest: Manifest, part: SplitModel, placement: Placement, folder: Path
) -> None:
    """Compare what the manifest says of the part's weights with what was loaded."""
    dtype = manifest.dtype if placement.dtype is not None else dtype_name(part.dtype)
    said = (manifest.num_parameters, manifest.dtype)
    found = (part.num_parameters(), dtype)
    if said != found:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} is of {short(said[0])} parameters in {short(said[1])}, the"
            f" weights beside it are {found[0]} in {found[1]}"
        )


def _manifest(part: SplitModel, files: Mapping[str, FileRecord]) -> Manifest:
    """Describe the part and its files."""
    return Manifest(
        spec=part.spec,
        model_type=part.config.model_type,
        num_layers=part.num_layers,
        num_parameters=part.num_parameters(),
        dtype=dtype_name(part.dtype),
        files=files,
    )


def _distinct_tensors(part: SplitModel) -> dict[str, torch.Tensor]:
    """Return the tensors to store: of those that are tied, the first."""
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in part.model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().contiguous()
    return tensors


class _replacing:  # noqa: N801 - used as a verb
    """Write beside a file, then take its place: readers see the old one or the new one.

    Also needed when the old one is still mapped: overwriting it would change live weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)
