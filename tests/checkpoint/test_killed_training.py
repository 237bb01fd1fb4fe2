"""The training script is killed and gone on with; a short `scripts/soak training`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from killed_training import _SCRIPT, _script, campaign


def test_killed_runs_end_with_the_losses_of_the_uninterrupted(tmp_path: Path) -> None:
    trials = list(campaign(tmp_path, seed=1, count=3, steps=30))

    assert not [trial for trial in trials if trial[1]]
    assert [what.split(",")[0] for what, _ in trials[1:]] == [
        "ranks [1",
        "ranks [2",
        "ranks [1",
    ]


def test_the_command_goes_on_where_a_run_ended(tmp_path: Path) -> None:
    script = _script()
    before = script.train(script.Settings(tmp_path / "run", steps=4, every=2, background=False))

    done = subprocess.run(
        [sys.executable, str(_SCRIPT), str(tmp_path / "run"), "--steps", "5"],
        check=True,
        timeout=110,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert "loss of step 5: " in done.stdout
    assert json.loads((tmp_path / "run" / "losses.json").read_text())[:4] == before
