"""Sharded checkpoints: which files a part needs, fetching them, and reading some of their tensors.

The builder does all of this on its own; these functions are for looking at it, or doing it by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.families import family_of
from splitlearn_core.headers import INDEX_FILE, read_header, read_index
from splitlearn_core.loading.files import find_files
from splitlearn_core.loading.sources import BIN_INDEX_FILE
from splitlearn_core.loading.torch_files import read_torch_file
from splitlearn_core.loading.type_names import names_of_type
from splitlearn_core.messages import in_one_line
from splitlearn_core.plan import BOTTOM, TOP
from splitlearn_core.regular_files import read_json
from splitlearn_core.utils.param_mapper import ParamMapper

if TYPE_CHECKING:
    import os

    import torch


class ShardLoader:
    """Looks into sharded checkpoints, in a folder or on the hub."""

    @staticmethod
    def is_sharded_model(
        model_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
    ) -> bool:
        """Whether the checkpoint has an index file, so is made of several files.

        Raises:
            ModelSourceError: (a `FileNotFoundError`) There is no such model.
        """
        return _find_index(model_path, cache_dir) is not None

    @staticmethod
    def load_index_json(
        model_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
    ) -> dict[str, Any]:
        """Return the index: `weight_map` names the file of each tensor.

        Raises:
            ModelSourceError: (a `FileNotFoundError`) The checkpoint has no index.
            CheckpointError: (a `ValueError`) The index is damaged.
        """
        path = _find_index(model_path, cache_dir)
        if path is None:
            raise ModelSourceError(f"{model_path} is not sharded: it has no {INDEX_FILE}")
        read_index(path)
        index: dict[str, Any] = read_json(path)
        return index

    @staticmethod
    def get_required_shards_for_component(
        index_json: Mapping[str, Any],
        component: str,
        layer_range: tuple[int, int],
        model_type: str,
        include_embedding: bool | None = None,
        include_final_norm: bool | None = None,
        include_lm_head: bool | None = None,
    ) -> set[str]:
        """Return the names of the files that hold a component's tensors.

        Args:
            index_json: From `load_index_json`; names are understood as they are for loading.
            component: `bottom`, `trunk` or `top`: decides what is not said otherwise.
            layer_range: The layers `[first, last)`.
            model_type: Architecture.
            include_embedding: Whether the embeddings are wanted; by default for `bottom`.
            include_final_norm: Whether the final norm is wanted; by default for `top`.
            include_lm_head: Whether the head is wanted; by default for `top`.  Where it is tied to
                the embedding, and has no tensor of its own, that one is.
        """
        weight_map: dict[str, str] = index_json["weight_map"]
        head = component == TOP if include_lm_head is None else include_lm_head
        norm = component == TOP if include_final_norm is None else include_final_norm
        embedding = component == BOTTOM if include_embedding is None else include_embedding
        names = {name: ParamMapper.get_module_name(name, model_type) for name in weight_map}
        lent = _lent(names.values(), model_type) if head else set()
        first, last = layer_range

        def wanted(name: str) -> bool:
            return (
                first <= ParamMapper.get_layer_number(name, model_type) < last
                or (embedding and ParamMapper.is_embedding(name, model_type))
                or (norm and ParamMapper.is_final_norm(name, model_type))
                or (head and ParamMapper.is_lm_head(name, model_type))
                or name in lent
                or ParamMapper.is_everywhere(name, model_type)
            )

        return {file for name, file in weight_map.items() if wanted(names[name])}

    @staticmethod
    def download_shards_if_needed(
        model_path: str | os.PathLike[str],
        shard_files: Iterable[str],
        cache_dir: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
    ) -> dict[str, Path]:
        """Return each file's path on this machine, fetching from the hub what is not here yet."""
        files = find_files(model_path, cache_dir=cache_dir, progress_bar=progress_bar)
        names = tqdm(sorted(shard_files), desc="Downloading shards", disable=not progress_bar)
        return {name: files.fetch(name) for name in names}

    @staticmethod
    def load_shard_partial(
        shard_path: str | os.PathLike[str], filter_fn: Callable[[str], bool]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of a file whose names `filter_fn` admits; others are not read.

        Raises:
            CheckpointError: (a `ValueError`) The file is damaged.
        """
        path = Path(shard_path)
        if path.suffix != ".safetensors":
            tensors = read_torch_file(path)
            return {name: tensor for name, tensor in tensors.items() if filter_fn(name)}
        names = [name for name in read_header(path) if filter_fn(name)]
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise CheckpointError(f"{path} can't be read: {in_one_line(error)}") from error


def _lent(names: Collection[str], model_type: str) -> set[str]:
    """Return which of a checkpoint's tensors the head shares, for want of its own."""
    known = names_of_type(model_type)
    if known is None:
        return set()
    named = {known.find(name) or name: name for name in names}
    head = family_of(model_type).epilogue[-1:]
    return {named[name] for name in known.lent(head, named) if name in named}


def _find_index(
    model_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None
) -> Path | None:
    """Return the index file on this machine, or `None` where there is none."""
    files = find_files(model_path, cache_dir=cache_dir)
    return files.find(INDEX_FILE) or files.find(BIN_INDEX_FILE)
