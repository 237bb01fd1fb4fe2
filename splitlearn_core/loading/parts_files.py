"""A folder of saved parts, as `splitlearn split` writes it, read as the checkpoint of one model.

Only what the parts that are there hold can be loaded: Bottom and Top, say, of a model whose Trunk
was carried to a server.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import SINGLE_FILE, read_header
from splitlearn_core.loading.files import SAFETENSORS_SUFFIX, TORCH_SUFFIXES, FolderFiles
from splitlearn_core.part_manifest import MANIFEST_FILE, described, parts_in
from splitlearn_core.shape import CONFIG_FILE, read_config

if TYPE_CHECKING:
    from pathlib import Path

    from splitlearn_core.loading.sources import SafetensorsSource

_OF_SAVING = {"_name_or_path", "architectures", "transformers_version", "use_cache"}
"""Keys of a config that may differ between parts of one model."""

_WEIGHTS = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES, ".index.json")


def parts_files(folder: Path) -> PartsFiles | None:
    """Return the saved parts in a folder that is no model itself; `None` where there are none.

    Raises:
        CheckpointError: (a `ValueError`) A part is damaged, two have the same layers, or they are
            of different models.
    """
    if os.path.lexists(folder / CONFIG_FILE) or not any(folder.glob(f"*/{MANIFEST_FILE}")):
        return None
    return PartsFiles(folder)


class PartsFiles(FolderFiles):
    """The files of saved parts: weights by `PART/model.safetensors`, all else by its own name.

    What lies beside the parts, as a tokenizer may, comes first; what every part has, as
    `config.json`, is the first part's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        parts = parts_in(folder)
        for before, after in pairwise(parts):
            if after.start_layer < before.end_layer:
                raise CheckpointError(
                    f"{folder}: {described(before)} and {described(after)} have the same layers:"
                    " name the part that is meant, or take one of them away"
                )
        self._parts = {path.name: FolderFiles(path) for path in parts.values()}
        self.description = f"{folder} ({', '.join(map(described, parts))})"
        self._check_alike()

    def find(self, name: str) -> Path | None:
        """Return the path of a file of the parts; raises as `FolderFiles.find`."""
        part, slash, rest = name.rpartition("/")
        if slash:
            return self._parts[part].find(rest) if part in self._parts else None
        if name.endswith(_WEIGHTS):
            return None  # there are several of that name
        found = (files.find(name) for files in self._parts.values())
        return super().find(name) or next((path for path in found if path is not None), None)

    def open(self) -> SafetensorsSource:
        """Return the tensors of all parts; what two have, as ends that are tied, is the first's.

        Raises:
            CheckpointError: (a `ValueError`) Two have different tensors of one name.
        """
        from splitlearn_core.loading.sources import (  # noqa: PLC0415 - needs torch
            SafetensorsSource,
        )

        weight_map: dict[str, str] = {}
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        for part in self._parts:
            file = f"{part}/{SINGLE_FILE}"
            for name, info in read_header(self.fetch(file)).items():
                kind = (info.dtype, tuple(info.shape))
                if kinds.setdefault(name, kind) != kind:
                    raise CheckpointError(
                        f"{self.describe(file)}: {name} is {kind[0]} {list(kind[1])}, in"
                        f" {self.describe(weight_map[name])} {kinds[name][0]}"
                        f" {list(kinds[name][1])}"
                    )
                weight_map.setdefault(name, file)
        return SafetensorsSource(self, weight_map)

    def _check_alike(self) -> None:
        """Refuse parts of different models, as far as both configs say what they are."""
        first: dict[str, Any] | None = None
        for files in self._parts.values():
            path = files.fetch(CONFIG_FILE)
            config = read_config(path)
            first = config if first is None else first
            said = sorted((config.keys() & first.keys()) - _OF_SAVING)
            if differs := [key for key in said if config[key] != first[key]]:
                raise CheckpointError(
                    f"{path} is of another model than the parts beside it: {differs[0]} is"
                    f" {config[differs[0]]!r}, not {first[differs[0]]!r}"
                )
