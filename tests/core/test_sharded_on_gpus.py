"""Sharded models over NCCL, a rank for each GPU (two at most)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Checkpoint
from ranks import Run, run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_ranks_on_gpus_compute_train_and_go_on(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    world = min(2, torch.cuda.device_count())
    settings = {"llama": str(make_checkpoint("llama", shard_size="40KB").path)}
    run = Run(str(tmp_path / "ranks"), ["gpu_checks"], world, settings, gpus=True)

    run_ranks(tmp_path, [run])

    for answers in run.answers():
        assert "error" not in answers["check_on_gpus"], answers["check_on_gpus"]["error"]
        found = answers["check_on_gpus"]["value"]
        for way in ("fsdp2 slices", "fsdp2 full_state", "fsdp1 slices", "fsdp1 full_state"):
            assert found[way]["device"]
            assert found[way]["error"] < 1e-5
        assert found["before"] == pytest.approx(found["plain"], rel=1e-4)
        assert found["loaded"] == pytest.approx(found["went on"], rel=1e-5)
