"""A download that is killed is gone on with; a seeded slice of `scripts/soak downloads`."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from killed_downloads import kill_and_go_on

KILLS = 10


def test_the_next_start_ends_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))

    trials = list(kill_and_go_on(tmp_path, seed=0, count=KILLS))

    assert not [trial for trial in trials if trial[1]]
    assert sum("not reached" not in what for what, _ in trials) > KILLS // 2
