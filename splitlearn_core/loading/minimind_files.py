"""MiniMind's files among others: found, opened as the Hugging Face model that they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.checkpoint.minimind import (
    AUTO,
    MINIMIND,
    MiniMindName,
    describe,
    is_minimind,
    may_be_minimind,
)
from splitlearn_core.checkpoint.models.plain_names import plain_names
from splitlearn_core.dtypes import dtype_name, main_dtype
from splitlearn_core.errors import ModelSourceError
from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE, listed
from splitlearn_core.loading.files import SAFETENSORS_SUFFIX, FolderFiles, config_type_of
from splitlearn_core.loading.generation import GENERATION_CONFIG_FILE
from splitlearn_core.loading.sources import (
    BIN_FILE,
    BIN_INDEX_FILE,
    SafetensorsSource,
    StoredTensor,
    TorchFileSource,
)
from splitlearn_core.shape import CONFIG_FILE, read_config

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.minimind import MiniMindModel
    from splitlearn_core.loading.files import CheckpointFiles
    from splitlearn_core.loading.sources import TensorSource
    from splitlearn_core.loading.stages import Progress

logger = logging.getLogger(__name__)

_OUT = "out"
# Where the tokenizer may lie, seen from the weights' folder: MiniMind keeps it in `model`, beside
# the folders that it writes weights to.
_WITHIN = (".", "model", "tokenizer")
_OUTSIDE = ("../model", "../tokenizer", "..")
_WEIGHTS_FOLDERS = {_OUT, "checkpoints"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_CHECKPOINTS = (SINGLE_FILE, INDEX_FILE, BIN_FILE, BIN_INDEX_FILE)
# What a MiniMind's own config says, and the options that it stands for.
_FROM_CONFIG = (
    "bos_token_id", "eos_token_id", "hidden_act", "inference_rope_scaling",
    "max_position_embeddings", "norm_topk_prob", "num_attention_heads", "num_experts_per_tok",
    "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "n_heads", "n_kv_heads",
    "norm_eps", "max_seq_len",
)  # fmt: skip


class MiniMindFiles(FolderFiles):
    """A MiniMind checkpoint, and the tokenizer that lies beside it.

    Attributes:
        model: What it is as a Hugging Face model.
    """

    def __init__(self, files: FolderFiles, options: Mapping[str, Any]) -> None:
        super().__init__(files.folder, files.weights_file)
        self._within = files
        self.description = str(
            files.folder / files.weights_file if files.weights_file else files.folder
        )
        with_config = {**_own_options(files), **options}
        source = self._open()
        try:
            self.model = _describe(source, self.description, with_config)
        finally:
            source.close()
        self.made_config = self.model.config

    def find(self, name: str) -> Path | None:
        """Return a file in the weights' folder, or, of a tokenizer, in one beside it."""
        if name == CONFIG_FILE:
            return None
        is_text = self._text is not None and name != GENERATION_CONFIG_FILE
        return self._text.find(name) if self._text and is_text else super().find(name)

    @cached_property
    def _text(self) -> FolderFiles | None:
        """The folder with the tokenizer, where there is one."""
        outside = _OUTSIDE if self.folder.resolve().name in _WEIGHTS_FOLDERS else ()
        folders = [FolderFiles(self.folder / place) for place in (*_WITHIN, *outside)]
        return next((f for f in folders if any(map(f.find, _TOKENIZER_FILES))), None)

    def open(self) -> TensorSource:
        """Open the weights, under the names that the Hugging Face model has."""
        return MiniMindSource(self._open(), self.model)

    def _open(self) -> TensorSource:
        """Open the weights as they are stored."""
        files = self._within
        name = files.weights_file
        if name is None:
            is_safe = any(files.find(name) for name in (SINGLE_FILE, INDEX_FILE))
            return SafetensorsSource.of(files) if is_safe else TorchFileSource.of(files)
        return _open_file(files, name)


def _open_file(files: FolderFiles, name: str) -> TensorSource:
    """Open one file by its name."""
    is_safe = name.endswith(SAFETENSORS_SUFFIX)
    return (SafetensorsSource if is_safe else TorchFileSource).single(files, name)


class MiniMindSource:
    """The tensors of a Hugging Face model, made of those that a MiniMind file has."""

    def __init__(self, source: TensorSource, model: MiniMindModel) -> None:
        self._source = source
        self._tensors = model.tensors
        self._own = {plain: own for own, plain in plain_names(source.names()).items()}

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._tensors.keys()

    def info(self, name: str) -> StoredTensor:
        """Return dtype and shape of one, without reading it."""
        made = self._tensors[name]
        parts = {part: self._source.info(self._own[part]) for part in made.sources}
        first = next(iter(parts.values()))
        shape = made.shape({part: info.shape for part, info in parts.items()})
        return StoredTensor(first.dtype, shape, sum(info.nbytes for info in parts.values()))

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Do nothing: the file is here."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor: a mapped one as it is, or a new one that is made of several."""
        made = self._tensors[name]
        groups = [self._joined(group, made.dim) for group in made.groups]
        if made.stacked:
            return torch.stack(groups)
        return in_halves(groups[0], made.pairs_of) if made.pairs_of else groups[0]

    def _joined(self, group: tuple[str, ...], dim: int) -> torch.Tensor:
        tensors = [self._source.read(self._own[part]) for part in group]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)

    def copied(self, tensor: torch.Tensor) -> None:
        """Let the file know, where the tensor is its own."""
        self._source.copied(tensor)

    def where(self, name: str) -> str:
        """Return the file, and the tensors of it that are meant."""
        made = self._tensors[name]
        stored = [self._own[part] for part in made.sources]
        place = self._source.where(stored[0])
        return place if stored == [name] else f"{place} ({listed(stored, 4)})"

    def close(self) -> None:
        """Let go of the file."""
        self._source.close()


def in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Sort the rows of each head from neighbouring pairs into halves.

    Rope that turns rows 2i and 2i+1 together does to the one what rope that turns i and i + half
    does to the other.

    Args:
        weight: [heads * width, in].
        heads: Number of heads.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _describe(source: TensorSource, where: str, options: Mapping[str, Any]) -> MiniMindModel:
    """Work out from names, shapes and the head's values what a file is."""
    names = plain_names(source.names())
    infos = {plain: source.info(own) for own, plain in names.items()}
    shapes = {plain: info.shape for plain, info in infos.items()}
    dtype = main_dtype((i.dtype, i.nbytes // i.dtype.itemsize) for i in infos.values())
    own = {plain: stored for stored, plain in names.items()}
    return describe(
        shapes,
        where,
        tied=_is_tied(source, own),
        dtype=dtype_name(dtype or torch.float32),
        options=options,
    )


def _is_tied(source: TensorSource, own: Mapping[str, str]) -> bool:
    """Whether the head has the values of the embeddings, or none of its own."""
    table = own.get("model.embed_tokens.weight", own.get("tok_embeddings.weight"))
    head = own.get("lm_head.weight", own.get("output.weight"))
    if table is None or head is None:
        return True
    return torch.equal(source.read(table), source.read(head))


def as_minimind(
    files: CheckpointFiles, model_type: str, options: Mapping[str, Any] | None
) -> MiniMindFiles | None:
    """Return the same files as MiniMind's, where that is what they are.

    They are where the caller says so, where a `config.json` does, and where a file without one has
    MiniMind's name (`full_sft_512.pth`) and MiniMind's tensors.

    Args:
        files: From `find_files`.
        model_type: `minimind`, `auto`, or another, which says that they are none.
        options: What such a file does not tell.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) A MiniMind model is asked for, and a folder has
            none, or several.
        CheckpointError: (a `ValueError`) A MiniMind model is asked for, and the file is none.
        ValueError: Options are given for what is none.
    """
    found = _found(files, model_type, options)
    if found is not None:
        made = MiniMindFiles(found, options or {})
        kind = made.model.config["model_type"]
        logger.info("%s is a MiniMind model, loaded as %s", made.description, kind)
        return made
    if options:
        raise ValueError(
            f"minimind options are given, but {files.description} is no MiniMind model; say"
            f" model_type='{MINIMIND}' if it is one"
        )
    return None


def _found(
    files: CheckpointFiles, model_type: str, options: Mapping[str, Any] | None
) -> FolderFiles | None:
    """Return the files that hold a MiniMind checkpoint, if any."""
    if not isinstance(files, FolderFiles):
        if model_type == MINIMIND:
            raise ModelSourceError(
                f"{files.description} is no file or folder here, as a MiniMind model must be"
            )
        return None
    config_type = config_type_of(files)
    if not may_be_minimind(files.weights_file, config_type, model_type, options):
        return None
    says_so = config_type == MINIMIND
    if model_type == AUTO and options is None and not says_so:
        return files if _has_its_tensors(files) else None
    if files.weights_file is not None or (
        says_so and any(files.find(name) for name in _CHECKPOINTS)
    ):
        return files
    return _the_one_in(files.folder)


def _own_options(files: FolderFiles) -> dict[str, Any]:
    """Return what MiniMind's own config beside the weights says that they don't tell."""
    path = files.find(CONFIG_FILE)
    config = {} if path is None else read_config(path)
    if config.get("model_type") != MINIMIND:
        return {}
    return {name: config[name] for name in _FROM_CONFIG if config.get(name) is not None}


def _has_its_tensors(files: FolderFiles) -> bool:
    """Whether the file that was named has MiniMind's tensors."""
    source = _open_file(files, files.weights_file or "")
    try:
        return is_minimind(plain_names(source.names()).values())
    finally:
        source.close()


def _the_one_in(folder: Path) -> FolderFiles:
    """Return the only MiniMind model in a folder, or in its `out`."""
    for place in (folder, folder / _OUT):
        names = sorted(_models_in(place))
        if len(names) == 1:
            return FolderFiles(place, weights_file=names[0])
        if names:
            raise ModelSourceError(
                f"{place} has several MiniMind models: {listed(names)}; name one of the files"
            )
    resumed = sorted(_models_in(folder, of_training=True))
    instead = f"; to take the weights of {listed(resumed)}, name the file" if resumed else ""
    raise ModelSourceError(
        f"no MiniMind model in {folder}, nor in {folder / _OUT}: no file is named as"
        f" full_sft_512.pth or pretrain_768_moe.pth are{instead}"
    )


def _models_in(folder: Path, *, of_training: bool = False) -> Iterator[str]:
    """Yield the files of a folder that are named as MiniMind's models (or `…_resume.pth`) are."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        name = MiniMindName.parse(path.name)
        if name is not None and not name.is_lora and name.is_resume is of_training:
            yield from [path.name] * path.is_file()
