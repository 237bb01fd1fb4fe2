"""Every certified architecture over two ranks, with FSDP2 and FSDP1."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ranks import Run, run_ranks

from splitlearn_core.families import KNOWN_TYPES

# Types for each pair of processes: what one breaks, another need not suffer for.
_AT_ONCE = 8


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Shard `count` types; each part must compute what it does unsharded, and the whole train."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    types = rng.sample(KNOWN_TYPES, min(count, len(KNOWN_TYPES)))
    for begin in range(0, len(types), _AT_ONCE):
        batch = types[begin : begin + _AT_ONCE]
        with tempfile.TemporaryDirectory() as name:
            job = Run(f"{name}/ranks", ["sharded_types"], 2, {"types": batch})
            run_ranks(Path(name), [job])
            verdicts = [found["check_types"] for found in job.answers()]
        for model_type in batch:
            wrong = {one.get("value", {}).get(model_type, one.get("error")) for one in verdicts}
            yield model_type, "; ".join(sorted(text for text in wrong if text))
