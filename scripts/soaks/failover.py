"""Generations whose server is killed, drained, reloaded or cut off at a random token."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from failover.campaign import Campaign


def run(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Generate `count` times; the tokens must be the unsplit model's."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), seed)
        yield from campaign.run(count)
        print(campaign.report, flush=True)
