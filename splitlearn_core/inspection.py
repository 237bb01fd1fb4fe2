"""What lies in a weights file or folder: names, shapes, dtypes and bytes, without the values.

Of safetensors only headers are read, and torch is not imported.  A file of torch's own format is
mapped, where it is of the present kind, and nothing of it is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.minimind import (
    LORA_FACTOR,
    MiniMindName,
    describe,
    is_minimind,
)
from splitlearn_core.checkpoint.models.plain_names import plain_names
from splitlearn_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from splitlearn_core.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    listed,
    read_header,
    read_index,
)
from splitlearn_core.loading.files import (
    ADAPTER_CONFIG_FILE,
    SAFETENSORS_SUFFIX,
    TORCH_SUFFIXES,
    FolderFiles,
)
from splitlearn_core.messages import short
from splitlearn_core.shape import CONFIG_FILE, read_config, shape_of
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64", "F64": "float64",
}  # fmt: skip
_PART_FILE = "splitlearn.json"
_TRAINING_FILE = "manifest.json"
_TRAINING_FORMAT = "splitlearn-training"
_SHARDED_FOLDER = "sharded"
_DCP_FILE = ".metadata"
_BIN_FILE, _BIN_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class FoundTensor:
    """One stored tensor.

    Attributes:
        name: As it is stored.
        dtype: As torch names it: `float16`, …
        shape: Sizes of its dimensions.
        nbytes: Bytes that it takes.
        file: The file that it lies in, by its name within the folder; of a DCP checkpoint those
            that have its pieces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        path: What was looked at.
        kind: `safetensors file`, `torch file`, `training file`, `model`, `part`, `parts`,
            `adapter`, `training checkpoint`, `DCP checkpoint`, `weights files` (a folder of them
            that says nothing more).
        tensors: In the order of the files and of their bytes.
        about: What else is said there, and what a MiniMind file is taken for.
    """

    path: str
    kind: str
    tensors: tuple[FoundTensor, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def values(self) -> int:
        """Number of values in all tensors; tied ones that are stored twice count twice."""
        return sum(tensor.numel for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        tensors = [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors]
        return {
            "path": self.path,
            "kind": self.kind,
            "values": self.values,
            "nbytes": self.nbytes,
            "about": dict(self.about),
            "tensors": tensors,
        }


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look into a weights file, or a folder of a model, a part, an adapter or a checkpoint.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) Nothing is there, or nothing that holds weights.
        CheckpointError: (a `ValueError`) It is damaged, or holds more than plain values; says what.
    """
    place = user_path(path)
    if place.is_dir():
        return _folder(place)
    if not place.exists():
        raise ModelSourceError(f"there is no file or folder {place}")
    if place.suffix in TORCH_SUFFIXES:
        return _torch_file(place)
    if place.suffix != SAFETENSORS_SUFFIX:
        known = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
        raise ModelSourceError(f"{place} is no weights file: those end in {known}")
    tensors = _header(place, place.name)
    return Inspection(str(place), "safetensors file", tensors, _minimind(tensors, place))


def _header(path: Path, name: str) -> tuple[FoundTensor, ...]:
    """Return the tensors of a safetensors file."""
    return tuple(
        FoundTensor(tensor, _DTYPES[info.dtype], info.shape, info.nbytes, name)
        for tensor, info in read_header(path).items()
    )


def _torch_file(path: Path) -> Inspection:
    """Look into a file of torch's own format."""
    from splitlearn_core.loading.torch_files import (  # noqa: PLC0415 - imports torch
        is_training_file,
        load_torch_file,
        plain_tensors,
    )

    loaded = load_torch_file(path)
    about: dict[str, Any] = {}
    if is_training_file(loaded):
        rest = {key: value for key, value in loaded.items() if key != "model"}
        about["beside the model"] = sorted(map(str, rest))
        about |= {k: v for k, v in rest.items() if isinstance(v, int | float | str | None)}
    weights = plain_tensors(loaded["model"] if about else loaded, path)
    tensors = tuple(
        FoundTensor(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.numel() * tensor.itemsize,
            path.name,
        )
        for name, tensor in weights.items()
    )
    kind = "training file" if about else "torch file"
    return Inspection(str(path), kind, tensors, about | _minimind(tensors, path))


def _minimind(tensors: Iterable[FoundTensor], path: Path) -> dict[str, Any]:
    """Return what a MiniMind file is taken for; nothing where it is none."""
    plain = plain_names(tensor.name for tensor in tensors)
    shapes = {plain[tensor.name]: tensor.shape for tensor in tensors}
    name = MiniMindName.parse(path.name)
    about: dict[str, Any] = {} if name is None else {"by its name": asdict(name)}
    ranks = {shape[0] for n, shape in shapes.items() if n.endswith(LORA_FACTOR) and shape}
    if ranks:
        return about | {"minimind": {"kind": "adapter", "rank": max(ranks)}}
    is_named = name is not None or "tok_embeddings.weight" in shapes
    if not (is_named and is_minimind(shapes)):
        return {}
    dtype = next(tensor.dtype for tensor in tensors)
    try:
        model = describe(shapes, str(path), tied=True, dtype=dtype)
    except (UnsupportedModelError, CheckpointError) as error:
        return about | {"minimind": {"refused": str(error)}}
    shown = {key: value for key, value in model.config.items() if key in _SHOWN}
    return about | {"minimind": {"kind": "model", "generation": model.generation, **shown}}


_SHOWN = {
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps",
    "num_local_experts", "num_experts", "num_experts_per_tok",
}  # fmt: skip


def _folder(folder: Path) -> Inspection:
    """Look into a folder, by what lies in it."""
    files = FolderFiles(folder)
    for name, look in _FOLDERS.items():
        if files.find(name) is not None:
            return look(files)
    if (parts := sorted(folder.glob(f"*/{_PART_FILE}"))) != []:
        return _parts(folder, [path.parent for path in parts])
    if (steps := sorted(folder.glob(f"*/{_TRAINING_FILE}"))) != []:
        raise ModelSourceError(
            f"{folder} holds checkpoints; name one: {listed(path.parent.name for path in steps)}"
        )
    if (names := _weights_files(folder)) != []:
        return _loose(folder, names)
    places = sorted(f"{path.name}/" for path in folder.iterdir() if _holds_weights(path))
    instead = f"; look into {listed(places)}" if places else ""
    raise ModelSourceError(
        f"nothing in {folder} holds weights that are known: no weights file, and none of"
        f" {', '.join(_FOLDERS)} is there{instead}"
    )


def _weights_files(folder: Path) -> list[str]:
    """Return the names of a folder's weights files, sorted."""
    suffixes = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)
    return sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)


def _holds_weights(path: Path) -> bool:
    """Whether something is a folder with anything in it that can be looked into."""
    return path.is_dir() and (
        _weights_files(path) != [] or any((path / name).exists() for name in _FOLDERS)
    )


def _loose(folder: Path, names: Iterable[str]) -> Inspection:
    """Look into each weights file of a folder that says nothing of them, as MiniMind's `out`."""
    found = {name: inspect(folder / name) for name in names}
    tensors = tuple(tensor for each in found.values() for tensor in each.tensors)
    about = {name: {"kind": each.kind, **each.about} for name, each in found.items()}
    return Inspection(str(folder), "weights files", tensors, about)


def _weights(files: FolderFiles) -> tuple[FoundTensor, ...]:
    """Return the tensors of a model's checkpoint, whatever its files are."""
    if files.find(SINGLE_FILE) is not None:
        return _header(files.fetch(SINGLE_FILE), SINGLE_FILE)
    if (index := files.find(INDEX_FILE)) is not None:
        return _sharded(files, read_index(index))
    if (index := files.find(_BIN_INDEX_FILE)) is not None:
        names = sorted(set(read_index(index).values()))
    elif files.find(_BIN_FILE) is not None:
        names = [_BIN_FILE]
    else:
        raise ModelSourceError(f"{files.folder} has a {CONFIG_FILE}, but no weights")
    return tuple(t for name in names for t in _torch_file(files.fetch(name)).tensors)


def _sharded(files: FolderFiles, weight_map: Mapping[str, str]) -> tuple[FoundTensor, ...]:
    """Return the tensors of a checkpoint of several files, which must have what its index says."""
    names = sorted(set(weight_map.values()))
    tensors = [t for name in names for t in _header(files.fetch(name), name)]
    found = {(tensor.name, tensor.file) for tensor in tensors}
    if lost := [name for name, file in weight_map.items() if (name, file) not in found]:
        raise CheckpointError(
            f"{files.describe(INDEX_FILE)} names tensors that their files have not: {listed(lost)}"
        )
    return tuple(tensors)


def _model(files: FolderFiles) -> Inspection:
    config = read_config(files.fetch(CONFIG_FILE))
    about: dict[str, Any] = {"model_type": config.get("model_type")}
    try:
        about |= asdict(shape_of(config, files.describe(CONFIG_FILE)))
    except (UnsupportedModelError, CheckpointError) as error:
        about["not to be split"] = str(error)
    return Inspection(str(files.folder), "model", _weights(files), about)


def _part(files: FolderFiles) -> Inspection:
    manifest = read_config(files.fetch(_PART_FILE))
    about = {key: manifest.get(key) for key in ("component", "model_type", "num_layers", "dtype")}
    return Inspection(str(files.folder), "part", _weights(files), about)


def _parts(folder: Path, parts: Iterable[Path]) -> Inspection:
    found = [_part(FolderFiles(path)) for path in parts]
    tensors = tuple(
        FoundTensor(t.name, t.dtype, t.shape, t.nbytes, f"{Path(part.path).name}/{t.file}")
        for part in found
        for t in part.tensors
    )
    about = {Path(part.path).name: dict(part.about) for part in found}
    return Inspection(str(folder), "parts", tensors, about)


def _adapter(files: FolderFiles) -> Inspection:
    config = read_config(files.fetch(ADAPTER_CONFIG_FILE))
    wanted = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    name = next((n for n in _ADAPTER_FILES if files.find(n) is not None), _ADAPTER_FILES[0])
    path = files.fetch(name)
    is_safe = name.endswith(SAFETENSORS_SUFFIX)
    tensors = _header(path, name) if is_safe else _torch_file(path).tensors
    return Inspection(
        str(files.folder), "adapter", tensors, {key: config.get(key) for key in wanted}
    )


def _training(files: FolderFiles) -> Inspection:
    manifest = read_config(files.fetch(_TRAINING_FILE))
    if manifest.get("format") != _TRAINING_FORMAT:
        raise ModelSourceError(f"{files.describe(_TRAINING_FILE)} is of no checkpoint of training")
    listed_files = manifest.get("files")
    names = sorted(listed_files) if isinstance(listed_files, dict) else []
    safe = [name for name in names if name.endswith(SAFETENSORS_SUFFIX)]
    tensors = tuple(t for name in safe for t in _header(_within(files.folder, name), name))
    pieces = files.folder / _SHARDED_FOLDER
    tensors += _in_pieces(pieces) if (pieces / _DCP_FILE).exists() else ()
    about = {"versions": manifest.get("versions"), "files": names}
    return Inspection(str(files.folder), "training checkpoint", tensors, about)


def _within(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names, which must lie in the manifest's folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder / _TRAINING_FILE} names {short(name)}, a file elsewhere")
    return path


def _dcp(files: FolderFiles) -> Inspection:
    names = sorted(path.name for path in files.folder.glob("*.distcp"))
    tensors = _in_pieces(files.folder)
    return Inspection(str(files.folder), "DCP checkpoint", tensors, {"files": names})


def _in_pieces(folder: Path) -> tuple[FoundTensor, ...]:
    """Return the tensors of a DCP folder."""
    from splitlearn_core.sharded.dcp_reader import stored_tensors  # noqa: PLC0415 - imports torch

    return tuple(
        FoundTensor(t.name, t.dtype, t.shape, t.nbytes, ", ".join(t.files))
        for t in stored_tensors(folder)
    )


# What a folder is, by the first of these that lies in it.
_FOLDERS: dict[str, Callable[[FolderFiles], Inspection]] = {
    _PART_FILE: _part,
    ADAPTER_CONFIG_FILE: _adapter,
    CONFIG_FILE: _model,
    _TRAINING_FILE: _training,
    _DCP_FILE: _dcp,
    SINGLE_FILE: lambda files: Inspection(str(files.folder), "model", _weights(files)),
    INDEX_FILE: lambda files: Inspection(str(files.folder), "model", _weights(files)),
    _BIN_FILE: lambda files: Inspection(str(files.folder), "model", _weights(files)),
}
