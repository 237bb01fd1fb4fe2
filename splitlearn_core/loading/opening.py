"""Open a model's checkpoint, whatever its files are and wherever they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE
from splitlearn_core.loading.files import SAFETENSORS_SUFFIX
from splitlearn_core.loading.hub import HubFiles
from splitlearn_core.loading.hub_source import open_hub_source
from splitlearn_core.loading.minimind_files import MiniMindFiles
from splitlearn_core.loading.parts_files import PartsFiles
from splitlearn_core.loading.sources import (
    BIN_FILE,
    BIN_INDEX_FILE,
    SafetensorsSource,
    TorchFileSource,
    no_weights,
)

if TYPE_CHECKING:
    from splitlearn_core.loading.files import CheckpointFiles
    from splitlearn_core.loading.sources import TensorSource


def open_source(files: CheckpointFiles) -> TensorSource:
    """Open the checkpoint among `files`: safetensors where there are any, else `.bin`.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There are no weights.
    """
    if isinstance(files, MiniMindFiles | PartsFiles):
        return files.open()
    if files.weights_file is not None and files.weights_file.endswith(SAFETENSORS_SUFFIX):
        return SafetensorsSource.single(files, files.weights_file)
    if files.weights_file is not None:
        return TorchFileSource.single(files, files.weights_file)
    if isinstance(files, HubFiles):
        return open_hub_source(files)
    if files.find(INDEX_FILE) is not None or files.find(SINGLE_FILE) is not None:
        return SafetensorsSource.of(files)
    if files.find(BIN_INDEX_FILE) is not None or files.find(BIN_FILE) is not None:
        return TorchFileSource.of(files)
    raise no_weights(files)
