"""Daemons that are killed in load, unload and inference, and started again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from killed_daemons import kill_and_restart


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Kill a daemon `count` times, and start it again."""
    with tempfile.TemporaryDirectory() as folder:
        yield from kill_and_restart(Path(folder), seed, count)
