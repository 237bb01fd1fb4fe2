"""The training script is killed and gone on with; a short `scripts/soak training`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from killed_training import _SCRIPT, campaign


def test_killed_runs_end_with_the_losses_of_the_uninterrupted(tmp_path: Path) -> None:
    trials = list(campaign(tmp_path, seed=1, count=3, steps=40))

    assert not [trial for trial in trials if trial[1]]
    assert [what.split(",")[0] for what, _ in trials[1:]] == [
        "ranks [1",
        "ranks [2",
        "ranks [1",
    ]


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(_SCRIPT), str(tmp_path / "run"), "--every", "2", "--steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    subprocess.run([*command, "4"], check=True, timeout=110, env=environment)
    done = subprocess.run(
        [*command, "5"], check=True, timeout=110, capture_output=True, text=True, env=environment
    )

    assert "loss of step 5: " in done.stdout
