"""What became of each tensor when weights were loaded into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoadReport:
    """Every name of the file and of the model, by what became of it; each list is sorted.

    Attributes:
        path: What was read.
        loaded: The model's tensors that have the file's values now.
        skipped: Names that the caller asked to leave out, of the file or of the model.
        missing: The model's tensors that the file has nothing for; they are as they were.
        unexpected: The file's tensors that the model has no place for.
        elsewhere: The file's tensors that belong to other parts of the model.
        ignored: Tables that older releases stored, and that are computed now.
        tied: The model's tensors that share their values with one that was loaded -> that one.
        cast: Loaded tensors whose dtype is the model's, not the file's -> `float16 -> float32`.
    """

    path: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the model has nothing that the file lacks, nor the file what the model lacks."""
        return not (self.missing or self.unexpected)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        counts = {key: len(value) for key, value in self.to_dict().items() if key != "path"}
        told = [f"{count} {key}" for key, count in counts.items() if count or key == "loaded"]
        return f"{self.path}: {', '.join(told)}"
