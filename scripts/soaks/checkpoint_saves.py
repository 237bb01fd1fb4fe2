"""Saves of training checkpoints that are killed or run into a full disk, or are damaged then."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from save_faults import campaign


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Try `count` faults; each is right, or says what is wrong."""
    logging.disable(logging.WARNING)  # a checkpoint that is passed over is logged: many are
    with tempfile.TemporaryDirectory() as folder:
        yield from campaign.run(Path(folder), seed, count)
