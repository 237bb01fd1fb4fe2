"""A daemon that is killed starts again as it should; a seeded slice of `scripts/soak kills`."""

from __future__ import annotations

from pathlib import Path

from killed_daemons import STAGES, kill_and_restart


def test_the_next_start_ends_right(tmp_path: Path) -> None:
    trials = list(kill_and_restart(tmp_path, seed=0, count=len(STAGES)))

    assert [wrong for _, wrong in trials] == [""] * len(STAGES)
    assert not any("hangs" in what for what, _ in trials)
