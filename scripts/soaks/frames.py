"""Wrong frames, and right ones out of place, sent to a daemon that serves others meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

from frame_fuzz.campaign import fuzz


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Send `count` frames, in conversations of some dozens."""
    yield from fuzz(seed, count)
