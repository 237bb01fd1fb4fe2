"""What a load is at, for those who want to show it beside its bytes."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol, runtime_checkable


class LoadStage(StrEnum):
    """What brings the bytes that `progress` tells of."""

    DOWNLOADING = "downloading"
    """They come from a hub."""
    READING = "reading"
    """They are put in place, from files that are here."""


@runtime_checkable
class Staged(Protocol):
    """A `progress` that also wants to know the stage."""

    def enter_stage(self, stage: LoadStage) -> None:
        """Hear that a stage begins; what it raises ends the load."""


Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); what it raises ends the load.  May be `Staged` too."""


def enter_stage(progress: Progress | None, stage: LoadStage) -> None:
    """Tell that a stage begins, where that is wanted."""
    if isinstance(progress, Staged):
        progress.enter_stage(stage)


class NeverBack:
    """Passes progress on, and counts tensors that were fetched, and are then placed, once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._highest = 0

    def __call__(self, done: int, total: int) -> None:
        """Report bytes."""
        self._highest = max(self._highest, done)
        self._progress(self._highest, total)

    def enter_stage(self, stage: LoadStage) -> None:
        """Report a stage."""
        enter_stage(self._progress, stage)
