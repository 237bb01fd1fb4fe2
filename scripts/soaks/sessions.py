"""Sixteen clients that run, stall, roll back, vanish and come back, at one daemon."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import transformers
from session_storm.families import BUILTIN, HYBRID, RECURRENT, Family
from session_storm.place import Place
from session_storm.storm import Storm

IDLE_TIMEOUT = 4.0
RESUME_TIMEOUT = 2.0


def _run(family: Family, seed: int, minutes: float) -> Iterator[tuple[str, str]]:
    """Let clients begin streams for so many minutes, and look at what is left."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with (
        tempfile.TemporaryDirectory() as folder,
        Place(Path(folder), [family], IDLE_TIMEOUT, RESUME_TIMEOUT) as place,
    ):
        storm = Storm(place, family, seed)
        yield from storm.run(seconds=60 * minutes)
        yield "the daemon's end", place.end()
        print(storm.report, flush=True)


run = partial(_run, BUILTIN)
run_recurrent = partial(_run, RECURRENT)
run_hybrid = partial(_run, HYBRID)
