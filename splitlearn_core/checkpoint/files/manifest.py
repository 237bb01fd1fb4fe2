"""`manifest.json` of a checkpoint: what files it is made of, and what is in them, by hashes.

A file is hashed in blocks, so that several can be hashed at once, and damage be told by its place.
The manifest has a hash of its own.  A folder that has one is complete: it is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import is_file_name
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.regular_files import read_json

MANIFEST_FILE = "manifest.json"
FORMAT = "splitlearn-training"
FORMAT_VERSION = 1

INSTEAD = (
    "copy the file again from where it is whole, or go on from the checkpoint before:"
    " load(fallback=True)"
)
"""What to do about damage."""

_DIGEST_LENGTH = 64


@dataclass(frozen=True)
class FileRecord:
    """What one file holds.

    Attributes:
        bytes: Its length.
        block_bytes: Length of the blocks that are hashed; the last is shorter.
        sha256: SHA-256 (hexadecimal) of each block, in order.
    """

    bytes: int
    block_bytes: int
    sha256: tuple[str, ...]

    def check(self) -> None:
        """Refuse figures that can't be."""
        for figure in (self.bytes, self.block_bytes):
            if type(figure) is not int or figure < 0:
                raise ValueError(f"{short(figure)} is no number of bytes")
        if len(self.sha256) != -(-self.bytes // max(1, self.block_bytes)):
            raise ValueError(f"{len(self.sha256)} hashes are not those of {self.bytes} bytes")
        if any(type(h) is not str or len(h) != _DIGEST_LENGTH for h in self.sha256):
            raise ValueError("a hash is no SHA-256")


def to_text(files: Mapping[str, FileRecord], versions: Mapping[str, str]) -> str:
    """Return the text of a manifest.

    Args:
        files: Every other file of the checkpoint, by its path within.
        versions: Of the libraries that wrote it.
    """
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": dict(versions),
        "files": {name: asdict(record) for name, record in files.items()},
    }
    return json.dumps({**body, "sha256": _digest(body)}, indent=1)


@contextmanager
def advising(path: Path) -> Iterator[None]:
    """Say what to do about a file that can't be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read: {error.strerror or error}; {INSTEAD}"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {INSTEAD}") from error


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Read what files a checkpoint is made of.

    Raises:
        CheckpointError: (a `ValueError`) There is no manifest, it is damaged, or another release's.
    """
    path = folder / MANIFEST_FILE
    with advising(path):
        body = read_json(path, unique_keys=True)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no manifest of a training checkpoint; {INSTEAD}")
    _check_version(body, path)
    digest = body.pop("sha256", None)
    if digest != _digest(body):
        raise CheckpointError(f"{path} is damaged: it is not what its own hash says; {INSTEAD}")
    try:
        return {_relative(name): _record(entry) for name, entry in body["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {in_one_line(error)}; {INSTEAD}") from error


def _check_version(body: Mapping[str, Any], path: Path) -> None:
    version = body.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:
        return
    raise CheckpointError(
        f"{path} has format_version {short(version)}; this release reads {FORMAT_VERSION}.  Load it"
        f" with the release that wrote it: {short(body.get('versions'))}"
    )


def _digest(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without it; how the JSON is laid out does not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _record(entry: dict[str, Any]) -> FileRecord:
    record = FileRecord(**{**entry, "sha256": tuple(entry["sha256"])})
    record.check()
    return record


def _relative(name: str) -> str:
    """Return a path that lies within the checkpoint: a file, or one in a folder of it."""
    if not (0 < len(parts := name.split("/")) <= 2 and all(map(is_file_name, parts))):  # noqa: PLR2004
        raise ValueError(f"{short(name)} is no file of a checkpoint")
    return name
