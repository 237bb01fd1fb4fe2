"""The mutation fuzz of checkpoints at full length."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import transformers
from checkpoint_fuzz.campaign import fuzz
from checkpoint_fuzz.cases import campaign_cases
from checkpoint_fuzz.sound import make_sound


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Try every truncation at a 4 KB boundary, and at least `count` damaged checkpoints in all."""
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder)
        make_sound(sound)
        for verdict in fuzz(campaign_cases(sound, count, seed), sound):
            yield f"{verdict.case} ({verdict.words})", "; ".join(verdict.violations)
