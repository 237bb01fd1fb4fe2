"""Training that is killed at random and gone on with, at one rank, at two, and in turns."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from killed_training import campaign


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Kill `count` runs several times each; all must end with the losses of the uninterrupted."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        yield from campaign(Path(folder), seed, count)
