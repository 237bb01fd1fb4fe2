"""A folder of saved parts, as `splitlearn split` writes it, read as the checkpoint of one model.

Only what the parts that are there hold can be loaded: Bottom and Top, say, of a model whose Trunk
was carried to a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import SINGLE_FILE, read_header
from splitlearn_core.loading.files import FolderFiles
from splitlearn_core.part_manifest import MANIFEST_FILE, described, parts_in
from splitlearn_core.shape import CONFIG_FILE, read_config

if TYPE_CHECKING:
    from pathlib import Path

    from splitlearn_core.loading.sources import SafetensorsSource

_OF_SAVING = {"dtype", "torch_dtype", "transformers_version"}
"""Keys of a config that may differ between parts of one model."""


def parts_files(folder: Path) -> PartsFiles | None:
    """Return the saved parts in a folder that is no model itself; `None` where there are none.

    Raises:
        CheckpointError: (a `ValueError`) A part is damaged, two are the same one, or they are of
            different models.
    """
    if (folder / CONFIG_FILE).exists() or not any(folder.glob(f"*/{MANIFEST_FILE}")):
        return None
    return PartsFiles(folder)


class PartsFiles(FolderFiles):
    """The files of saved parts: weights by `PART/model.safetensors`, all else by its own name.

    What every part has, as `config.json`, is the first part's.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        parts = parts_in(folder)
        self._parts = {path.name: FolderFiles(path) for path in parts.values()}
        self.description = f"{folder} ({', '.join(map(described, parts))})"
        self._check_alike()

    def find(self, name: str) -> Path | None:
        """Return the path of a file of the parts; raises as `FolderFiles.find`."""
        part, slash, rest = name.rpartition("/")
        if slash:
            return self._parts[part].find(rest) if part in self._parts else None
        found = (files.find(name) for files in self._parts.values())
        return next((path for path in found if path is not None), None)

    def open(self) -> SafetensorsSource:
        """Return the tensors of all parts; what two have, as ends that are tied, is the first's."""
        from splitlearn_core.loading.sources import (  # noqa: PLC0415 - needs torch
            SafetensorsSource,
        )

        weight_map: dict[str, str] = {}
        for part in self._parts:
            file = f"{part}/{SINGLE_FILE}"
            for name in read_header(self.fetch(file)):
                weight_map.setdefault(name, file)
        return SafetensorsSource(self, weight_map)

    def _check_alike(self) -> None:
        """Refuse parts of different models."""
        first: dict[str, Any] | None = None
        for files in self._parts.values():
            path = files.fetch(CONFIG_FILE)
            config = {k: v for k, v in read_config(path).items() if k not in _OF_SAVING}
            first = config if first is None else first
            if differs := sorted(k for k in config | first if config.get(k) != first.get(k)):
                raise CheckpointError(
                    f"{path} is of another model than the parts beside it: {differs[0]} is"
                    f" {config.get(differs[0])!r}, not {first.get(differs[0])!r}"
                )
