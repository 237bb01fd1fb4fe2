"""Where the parts of a split model lie on disk: one folder each under a common base."""

from __future__ import annotations

import os
from pathlib import Path

from splitlearn_core.plan import BOTTOM, TOP, TRUNK
from splitlearn_core.user_paths import user_path

MANIFEST_FILE = "splitlearn.json"


class StorageManager:
    """Paths of saved parts: `BASE/bottom/`, `BASE/trunk/`, `BASE/top/`."""

    @staticmethod
    def get_split_model_path(storage_path: str | os.PathLike[str], component: str) -> Path:
        """Return the folder of one part."""
        return user_path(storage_path) / component

    @staticmethod
    def get_model_metadata_path(storage_path: str | os.PathLike[str], component: str) -> Path:
        """Return the manifest of one part."""
        return StorageManager.get_split_model_path(storage_path, component) / MANIFEST_FILE

    @staticmethod
    def create_storage_directories(
        storage_path: str | os.PathLike[str], components: tuple[str, ...] = (BOTTOM, TRUNK, TOP)
    ) -> dict[str, Path]:
        """Make the parts' folders where they are not there yet, and return them by name."""
        folders = {
            name: StorageManager.get_split_model_path(storage_path, name) for name in components
        }
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return folders
