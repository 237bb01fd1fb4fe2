"""The manifest of a part's folder, `splitlearn.json`: which part lies there, and in which files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.headers import SINGLE_FILE, is_file_name, listed
from splitlearn_core.loading.files import FolderFiles, check_link
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.plan import BOTTOM, FULL, TOP, TRUNK, ComponentSpec
from splitlearn_core.regular_files import open_regular
from splitlearn_core.shape import CONFIG_FILE, read_config
from splitlearn_core.user_paths import user_path

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


def saved_parts(folder: str | os.PathLike[str]) -> dict[ComponentSpec, Path]:
    """Return the parts that lie in `folder`, one folder each, in the order of the layers.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is none.
        CheckpointError: (a `ValueError`) One is damaged, two are the same part, or they don't
            follow one another.
    """
    found = parts_in(folder)
    for before, after in pairwise(found):
        if before.end_layer != after.start_layer:
            raise CheckpointError(
                f"{folder}: {before.name} ends before layer {before.end_layer}, {after.name}"
                f" begins with {after.start_layer}"
            )
    return found


def parts_in(folder: str | os.PathLike[str]) -> dict[ComponentSpec, Path]:
    """Return the parts that lie in `folder`, be there some missing between them or not.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is none.
        CheckpointError: (a `ValueError`) One is damaged, a link that leaves the folder, or two are
            the same part.
    """
    folders = [path.parent for path in user_path(folder).glob(f"*/{MANIFEST_FILE}")]
    if not folders:
        raise ModelSourceError(f"no saved parts in {folder}: no folder in it has a {MANIFEST_FILE}")
    found: dict[ComponentSpec, Path] = {}
    for path in sorted(folders):
        if path.is_symlink():
            check_link(path)
        first = found.setdefault(read_manifest(path).spec, path)
        if first != path:
            raise CheckpointError(
                f"{first} and {path} hold the same part, {described(read_manifest(path).spec)}:"
                " take one of them away"
            )
    ordered = sorted(found, key=lambda spec: (spec.start_layer, spec.end_layer, spec.is_last))
    return {spec: found[spec] for spec in ordered}


def described(spec: ComponentSpec) -> str:
    """Name a part and its layers."""
    return f"{spec.name} [{spec.start_layer}, {spec.end_layer})"


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
    check_hash(folder / CONFIG_FILE, manifest.files[CONFIG_FILE])
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


def check_hash(path: Path, record: FileRecord) -> None:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
