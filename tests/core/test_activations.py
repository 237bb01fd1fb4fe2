"""The bound on what a forward takes beside the weights, against what torch allocates for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import tiny_model
from torch.profiler import ProfilerActivity, profile

from splitlearn_core.activations import FIRST_FORWARD, forward_nbytes
from splitlearn_core.estimate import MemoryEstimate
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POSITIONS = 8


def allocated_at_peak(work: Callable[[], object]) -> int:
    """Return the most bytes that torch has allocated on the CPU at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


# plain, experts, latent attention, recurrent of both kinds, with decays for each channel
@pytest.mark.parametrize(
    "model_type", ["gpt2", "qwen2", "mixtral", "deepseek_v3", "mamba2", "qwen3_next", "kimi_linear"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_forward_takes_more(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    part = load_component(tmp_path, "full", dtype=dtype)
    ids = torch.zeros(1, POSITIONS, dtype=torch.long)
    with torch.no_grad():
        taken = allocated_at_peak(lambda: part(ids))

    bound = bound_of(part) - FIRST_FORWARD
    assert 0 < taken <= bound
    assert bound < 60 * taken  # so that it says something


def bound_of(part: SplitModel) -> int:
    return forward_nbytes(part.model, part._family, POSITIONS)


def test_more_positions_take_more(tiny_checkpoint: Path) -> None:
    part = load_component(tiny_checkpoint, "full")
    one, two = (forward_nbytes(part.model, part._family, n) for n in (8, 16))
    assert two - FIRST_FORWARD == 2 * (one - FIRST_FORWARD) > 0


def test_a_head_counts_where_it_is(tiny_checkpoint: Path) -> None:
    bottom, trunk, top = (
        bound_of(load_component(tiny_checkpoint, name, [2, 4]))
        for name in ("bottom", "trunk", "top")
    )
    assert trunk < bottom < top


def test_an_estimate_counts_a_warm_up_that_is_asked_for(tiny_checkpoint: Path) -> None:
    cold = estimate_component(tiny_checkpoint, "trunk", [2, 4])
    warm = estimate_component(tiny_checkpoint, "trunk", [2, 4], warm_up_positions=POSITIONS)

    part = load_component(tiny_checkpoint, "trunk", [2, 4])
    assert cold.warm_up_bytes == 0
    assert warm.warm_up_bytes == bound_of(part)
    assert warm.steady_bytes == cold.steady_bytes
    assert warm.peak_bytes == max(cold.peak_bytes, warm.steady_bytes + warm.warm_up_bytes)


def test_two_are_warmed_up_when_both_are_there() -> None:
    both = MemoryEstimate(15, 10, 3) + MemoryEstimate(8, 6, 2)
    assert both == MemoryEstimate(21, 16, 5)
    assert MemoryEstimate(15, 10) + MemoryEstimate(9, 6) == MemoryEstimate(19, 16)
