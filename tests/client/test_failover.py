"""A slice of the failover campaign; `scripts/soak failover` is the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from failover.campaign import Campaign

SEED = 4
TRIALS = 8  # each event once, and a kill more


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tokens_are_the_unsplit_models_whatever_becomes_of_the_server(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, SEED)

    wrong = [f"{what}: {wrong}" for what, wrong in campaign.run(TRIALS) if wrong]

    assert not wrong, "\n".join([*wrong, str(campaign.report)])
    assert campaign.report.healed > 0
    assert campaign.report.positions > 0
