"""A part on disk: `config.json`, `model.safetensors`, and `splitlearn.json`, the manifest.

A part with the head has `generation_config.json` as well.

The config is the whole model's; the tensors have the names that the whole model's have, or its
checkpoint's; the manifest says which part this is, and holds the other files' SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import save_file

from splitlearn_core.adapter_layers import refuse_adapters
from splitlearn_core.builder import build_part
from splitlearn_core.devices import check_device
from splitlearn_core.dtypes import as_dtype, dtype_name
from splitlearn_core.errors import CheckpointError, ModelSourceError, StorageError
from splitlearn_core.families import family_of
from splitlearn_core.headers import SINGLE_FILE, is_file_name, listed
from splitlearn_core.loading.files import TORCH_SUFFIXES, FolderFiles
from splitlearn_core.loading.generation import GENERATION_CONFIG_FILE, generation_config_for
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.sources import SafetensorsSource
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.plan import BOTTOM, FULL, TOP, TRUNK, ComponentSpec
from splitlearn_core.regular_files import open_regular
from splitlearn_core.shape import CONFIG_FILE, read_config
from splitlearn_core.skeleton import load_config
from splitlearn_core.uncertified import any_family
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from splitlearn_core.split_model import SplitModel

MANIFEST_FILE = "splitlearn.json"
FORMAT_VERSION = 1

_T = TypeVar("_T")


@dataclass(frozen=True)
class Manifest:
    """What `splitlearn.json` says.

    Attributes:
        spec: Which part of the model lies in the folder.
        model_type: Architecture.
        num_layers: Of the whole model.
        num_parameters: Of the part.
        dtype: Of the part's weights, as `float32`.
        files: File name -> its length in bytes and its SHA-256, for every other file.
    """

    spec: ComponentSpec
    model_type: str
    num_layers: int
    num_parameters: int
    dtype: str
    files: Mapping[str, FileRecord]

    def to_dict(self) -> dict[str, Any]:
        """Return what is written."""
        fields = asdict(self)
        return {"format_version": FORMAT_VERSION, "component": fields.pop("spec"), **fields}

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(self.to_dict(), indent=1)


@dataclass(frozen=True)
class FileRecord:
    """Length and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read a file through."""
        return cls(path.stat().st_size, _sha256(path))


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
        _check_hash(folder / name, record)
    return manifest


def saved_parts(folder: str | os.PathLike[str]) -> dict[ComponentSpec, Path]:
    """Return the parts that lie in `folder`, one folder each, in the order of the layers.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is none.
        CheckpointError: (a `ValueError`) One is damaged, two are the same part, or they don't
            follow one another.
    """
    folders = [path.parent for path in user_path(folder).glob(f"*/{MANIFEST_FILE}")]
    if not folders:
        raise ModelSourceError(f"no saved parts in {folder}: no folder in it has a {MANIFEST_FILE}")
    found: dict[ComponentSpec, Path] = {}
    for path in sorted(folders):
        first = found.setdefault(read_manifest(path).spec, path)
        if first != path:
            raise CheckpointError(
                f"{first} and {path} hold the same part, {_describe(read_manifest(path).spec)}:"
                " take one of them away"
            )
    ordered = sorted(found, key=lambda spec: (spec.start_layer, spec.end_layer, spec.is_last))
    for before, after in pairwise(ordered):
        if before.end_layer != after.start_layer:
            raise CheckpointError(
                f"{folder}: {before.name} ends before layer {before.end_layer}, {after.name}"
                f" begins with {after.start_layer}"
            )
    return {spec: found[spec] for spec in ordered}


def _describe(spec: ComponentSpec) -> str:
    """Name a part and its layers."""
    return f"{spec.name} [{spec.start_layer}, {spec.end_layer})"


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


def read_manifest(folder: Path) -> Manifest:
    """Read which part lies in `folder`, and check the manifest against the files' lengths.

    The config, which is small, is compared with its hash as well.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) The folder has no manifest.
        CheckpointError: (a `ValueError`) The manifest is damaged, or a file is not the one that it
            was written for.
    """
    files = FolderFiles(folder)
    path = files.find(MANIFEST_FILE)
    if path is None:
        raise ModelSourceError(
            f"no saved part in {folder}: it has no {MANIFEST_FILE} (saving may not have ended)"
        )
    manifest = _parse_manifest(read_config(path), path)
    for name, record in manifest.files.items():
        with open_regular(files.fetch(name)) as file:
            actual = os.fstat(file.fileno()).st_size
        if actual != record.bytes:
            raise CheckpointError(
                f"{folder / name} has {actual} bytes, the manifest says {record.bytes}"
            )
    _check_hash(folder / CONFIG_FILE, manifest.files[CONFIG_FILE])
    return manifest


def _parse_manifest(fields: dict[str, Any], path: Path) -> Manifest:
    """Check the manifest's own form."""
    version = fields.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {short(version)}; this release reads {FORMAT_VERSION}"
        )
    try:
        spec = _typed(ComponentSpec, fields.pop("component"))
        files = {
            _file_name(name): _typed(FileRecord, entry)
            for name, entry in fields.pop("files").items()
        }
        _check_types(Manifest, fields)
        manifest = Manifest(spec=spec, files=files, **fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {in_one_line(error)}") from error
    if absent := {CONFIG_FILE, SINGLE_FILE} - files.keys():
        raise CheckpointError(f"{path} does not vouch for {listed(absent)}")
    if not _is_part(spec, manifest.num_layers):
        raise CheckpointError(
            f"{path}: {short(asdict(spec))} is no part of a model with"
            f" {short(manifest.num_layers)} layers"
        )
    return manifest


def _is_part(spec: ComponentSpec, num_layers: int) -> bool:
    """Whether a plan for so many layers could have this part."""
    kind, dash, number = spec.name.partition("-")
    ends = {BOTTOM: (True, False), TRUNK: (False, False), TOP: (False, True), FULL: (True, True)}
    return (
        ends.get(kind) == (spec.is_first, spec.is_last)
        and (not dash or (kind == TRUNK and number.isdecimal()))
        and 0 <= spec.start_layer <= spec.end_layer <= num_layers
        and (not spec.is_first or spec.start_layer == 0)
        and (not spec.is_last or spec.end_layer == num_layers)
    )


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


def _check_hash(path: Path, record: FileRecord) -> None:
    """Refuse a file that is not the one that was saved."""
    found = _sha256(path)
    if found != record.sha256:
        raise CheckpointError(
            f"{path} is not what was saved: its SHA-256 is {found}, the manifest says"
            f" {short(record.sha256)}; copy the part again"
        )


def _typed(kind: type[_T], fields: dict[str, Any]) -> _T:
    """Make a dataclass of plain values, each checked against its annotation."""
    _check_types(kind, fields)
    return kind(**fields)


def _check_types(kind: type, fields: dict[str, Any]) -> None:
    """Compare plain values with a dataclass's annotations."""
    wanted = get_type_hints(kind)
    wrong = {key: value for key, value in fields.items() if type(value) is not wanted.get(key)}
    if wrong:
        raise ValueError(f"{kind.__name__} can't have {short(wrong)}")


def _file_name(name: str) -> str:
    """Return a name that lies in the part's own folder."""
    if not is_file_name(name):
        raise ValueError(f"{short(name)} is no file name")
    return name


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
