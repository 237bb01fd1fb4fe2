"""Write a checkpoint's parts as folders that need the original no more.

Each folder is one that `SplitModel.load` reads: `config.json`, `model.safetensors`, the manifest
`splitlearn.json`, and what turns text into token ids and back where the part needs it.  Tensors
keep the checkpoint's own names, so that they are understood as the original is.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import tempfile
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.builder import draw_each
from splitlearn_core.dtypes import as_dtype, dtype_name, main_dtype
from splitlearn_core.errors import SplitLearnError, StorageError
from splitlearn_core.factory import AUTO, find_model
from splitlearn_core.headers import SINGLE_FILE
from splitlearn_core.loading.files import stored_config
from splitlearn_core.loading.opening import open_source
from splitlearn_core.part_folder import write_manifest
from splitlearn_core.part_manifest import MANIFEST_FILE, FileRecord, Manifest
from splitlearn_core.plan import SplitPlan
from splitlearn_core.shape import CONFIG_FILE
from splitlearn_core.tensor_writer import TensorSpec, write_tensors
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from splitlearn_core.factory import OpenModel
    from splitlearn_core.loading.files import CheckpointFiles
    from splitlearn_core.loading.materialize import PartReads
    from splitlearn_core.loading.sources import TensorSource
    from splitlearn_core.loading.stages import Progress
    from splitlearn_core.plan import ComponentSpec

# What goes with the parts that take token ids or give logits.  Never code: no *.py.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


# What the system says of a disk, a quota or a file system that takes no more.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class WrittenPart:
    """A part on disk.

    Attributes:
        folder: Where it lies.
        manifest: What its manifest says.
    """

    folder: Path
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        """Bytes of its files, the manifest left out."""
        return sum(record.bytes for record in self.manifest.files.values())


@dataclass(frozen=True)
class _Outline:
    """A part before it is written: which tensors go into its file, and how.

    Attributes:
        spec: Which part.
        num_parameters: Number of weights.
        tensors: The file's, by name.
        built_as: The dtype that the part is built with, which its config names.
    """

    spec: ComponentSpec
    num_parameters: int
    tensors: dict[str, TensorSpec]
    built_as: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the values, as `SplitModel.dtype` has it."""
        tensors = self.tensors.values()
        found = main_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in tensors)
        return found or next(iter(tensors)).dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def split_checkpoint(
    model_name_or_path: str | os.PathLike[str],
    split_points: Iterable[int],
    out: str | os.PathLike[str],
    *,
    model_type: str = AUTO,
    dtype: torch.dtype | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    allow_empty: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    token: str | bool | None = None,
    allow_uncertified: bool = False,
    minimind: Mapping[str, Any] | None = None,
) -> list[WrittenPart]:
    """Write each part of a model as a folder: `OUT/bottom`, `OUT/trunk`, `OUT/top`.

    Peak memory: one tensor's mapped pages, and 4 Mi elements where they are cast.  The folders are
    written in a hidden one beside `out` (within it, where it is there already), and moved to their
    places when all of them are complete: a run that fails leaves nothing.

    Args:
        model_name_or_path: Folder, `builtin:NAME`, hub name, or weights file.
        split_points: Layer numbers of the cuts.
        out: Folder for the parts; it may be there if it is empty.
        model_type: Architecture; `auto` takes the config's.
        dtype: Cast floating-point tensors to this; `None` keeps what is stored.
        cache_dir: Where files from the hub are kept.
        revision: Branch, tag or commit on the hub.
        allow_empty: Let Bottom or Top have no layers.
        force: Take the place of parts that lie in `out`, all of them.  Other files there stay.
        progress: Called with (bytes done, bytes in all) between tensors; what it raises ends the
            run and leaves nothing.
        token: For the hub; `None` uses `HF_TOKEN` or the login.
        allow_uncertified: Let in an architecture that was not certified.
        minimind: As in `load_component`.

    Returns:
        The parts, from Bottom to Top.

    Raises:
        FileExistsError: `out` holds something, and `force` is not given, or it is no part.
        OSError: There is no room for the parts, or they can't be written.
        ModelSourceError, CheckpointError, UnsupportedModelError, ValueError: As `load_component`.
    """
    wanted = as_dtype(dtype)
    model = find_model(
        model_name_or_path,
        model_type=model_type,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        allow_uncertified=allow_uncertified,
        minimind=minimind,
    )
    plan = SplitPlan.from_split_points(model.num_layers, split_points, allow_empty=allow_empty)
    target = user_path(out).resolve()
    _check_target(target, plan, force=force)
    with closing(open_source(model.files)) as source:
        outlines = _outlines(model, plan, source, wanted)
        _check_room(target, sum(outline.nbytes for outline in outlines))
        with _writing(target), _staging(target) as staging:
            manifests = _write_parts(model, outlines, source, staging, progress)
            _put_in_place(staging, target, plan.names)
    return [WrittenPart(target / m.spec.name, m) for m in manifests]


def _check_target(target: Path, plan: SplitPlan, *, force: bool) -> None:
    """Refuse to write where something else lies."""
    here = _nearest(target)
    if not here.is_dir():
        raise FileExistsError(f"{here} is a file; name a folder for the parts")
    if here != target:
        return
    if not force and any(target.iterdir()):
        raise FileExistsError(
            f"{target} is not empty; name another folder, or replace the parts in it with force"
            " (--force)"
        )
    for name in plan.names:
        place = target / name
        if place.exists() and not (place / MANIFEST_FILE).is_file():
            raise FileExistsError(f"{place} is no part of a model, so it is not replaced")


def _nearest(target: Path) -> Path:
    """Return what there is already of a path."""
    return next(path for path in (target, *target.parents) if path.exists())


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Lend a folder on the file system of `target`, which may be a mount point of its own."""
    around = target if target.exists() else target.parent
    around.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=around) as name:
        yield Path(name)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say where it was, when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or isinstance(error, SplitLearnError):
            raise
        raise StorageError(
            f"the parts can't be written to {target}: {error.strerror or error}; nothing of them is"
            " left there.  Make room, or name another folder",
            error.errno,
        ) from error


def _outlines(
    model: OpenModel, plan: SplitPlan, source: TensorSource, dtype: torch.dtype | None
) -> list[_Outline]:
    """Work out from headers what the parts' files will hold."""
    drawn = draw_each(model.config, plan.components, source, model.description, model.family, dtype)
    return [
        _Outline(
            spec,
            sum(parameter.numel() for parameter in blueprint.model.parameters()),
            _tensors(blueprint.reads),
            blueprint.reads.dtype,
        )
        for spec, blueprint in zip(plan.components, drawn, strict=True)
    ]


def _tensors(reads: PartReads) -> dict[str, TensorSpec]:
    """Return what becomes of the stored tensors that a part needs."""
    return {
        name: TensorSpec(stored.final_dtype, stored.shape) for name, stored in reads.stored.items()
    }


def _check_room(target: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for."""
    here = _nearest(target)
    free = shutil.disk_usage(here).free
    if needed > free:
        raise OSError(f"the parts need {needed:,} bytes; {here} has room for {free:,}")


def _write_parts(
    model: OpenModel,
    outlines: Sequence[_Outline],
    source: TensorSource,
    staging: Path,
    progress: Progress | None,
) -> list[Manifest]:
    """Write one folder for each outline."""
    total = sum(outline.nbytes for outline in outlines)
    sizes = {name: t.nbytes for outline in outlines for name, t in outline.tensors.items()}
    done = 0

    def read(name: str) -> torch.Tensor:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += sizes[name]
        return source.read(name)

    def write(outline: _Outline) -> Manifest:
        source.prepare(outline.tensors, lambda *_: progress(done, total) if progress else None)
        return _write_part(model, outline, staging / outline.spec.name, read)

    manifests = [write(outline) for outline in outlines]
    if progress is not None:
        progress(total, total)
    return manifests


def _write_part(
    model: OpenModel, outline: _Outline, folder: Path, read: Callable[[str], torch.Tensor]
) -> Manifest:
    """Write a part's folder, its manifest last."""
    folder.mkdir()
    _write_config(stored_config(model.files)[0], folder, outline.built_as)
    weights = write_tensors(folder / SINGLE_FILE, outline.tensors, read)
    if outline.spec.is_first or outline.spec.is_last:
        _copy_text_files(model.files, folder)
    records = {p.name: FileRecord.of(p) for p in folder.iterdir() if p.name != SINGLE_FILE}
    records[SINGLE_FILE] = FileRecord(weights.nbytes, weights.sha256)
    manifest = Manifest(
        spec=outline.spec,
        model_type=model.config.model_type,
        num_layers=model.num_layers,
        num_parameters=outline.num_parameters,
        dtype=dtype_name(outline.dtype),
        files=dict(sorted(records.items())),
    )
    write_manifest(folder, manifest)
    return manifest


def _write_config(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Copy the config, with the dtype that the part is built with."""
    config.pop("torch_dtype", None)  # the older name of the same
    config["dtype"] = dtype_name(dtype)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _copy_text_files(files: CheckpointFiles, folder: Path) -> None:
    """Copy what turns text into token ids and back."""
    for name in TEXT_FILES:
        path = files.find(name)
        if path is not None:
            shutil.copyfile(path, folder / name)


def _put_in_place(staging: Path, target: Path, names: Iterable[str]) -> None:
    """Move the finished parts to where they are wanted; parts that lay there go."""
    old = {path.parent for path in target.glob(f"*/{MANIFEST_FILE}")}
    target.mkdir(exist_ok=True)
    for name in names:
        place = target / name
        if place in old:
            place.rename(staging / f"{name}.old")
        (staging / name).rename(place)
    for stale in old - {target / name for name in names}:
        shutil.rmtree(stale)
