"""Open whatever holds weights: a file, or a folder of a model or of a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_core.errors import ModelSourceError
from splitlearn_core.loading.files import SAFETENSORS_SUFFIX, TORCH_SUFFIXES, FolderFiles
from splitlearn_core.loading.opening import open_source
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os

    from splitlearn_core.loading.sources import TensorSource


def open_weights(path: str | os.PathLike[str]) -> TensorSource:
    """Open the weights at `path`, under the names that they have there.

    Args:
        path: A `.safetensors`, `.pth`, `.pt` or `.bin` file, or a folder that holds a model's
            checkpoint or a part.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) Nothing is there, or no weights.
        CheckpointError: (a `ValueError`) What is there is damaged.
    """
    place = user_path(path)
    if place.is_dir():
        return open_source(FolderFiles(place))
    if not place.exists():
        raise ModelSourceError(f"there are no weights at {place}: no such file or folder")
    if place.suffix in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES):
        return open_source(FolderFiles(place.parent, weights_file=place.name))
    known = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
    raise ModelSourceError(f"{place}: a weights file ends in {known}")
