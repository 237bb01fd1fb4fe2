"""Downloads that are killed at any line of the code that fetches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from killed_downloads import kill_and_go_on


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Kill a download `count` times, and go on with it."""
    with tempfile.TemporaryDirectory() as folder:
        yield from kill_and_go_on(Path(folder), seed, count)
