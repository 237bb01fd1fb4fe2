"""A default dtype of one thread's own: models are built with theirs while others compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import local_torch_dtype

from splitlearn_core.default_dtype import own_default_dtype
from splitlearn_core.errors import CheckpointError
from splitlearn_core.skeleton import build_skeleton

BF16, F32 = torch.bfloat16, torch.float32


def default() -> torch.dtype:
    """Return what torch says now: it is another function by then."""
    return torch.get_default_dtype()


MADE: list[tuple[Callable[[], Any], torch.dtype]] = [
    (default, BF16),
    (lambda: torch.empty(2).dtype, BF16),
    (lambda: torch.tensor([1.5]).dtype, BF16),
    (lambda: torch.full((2,), 0.5).dtype, BF16),
    (lambda: torch.arange(0, 1, 0.25).dtype, BF16),
    (lambda: (torch.arange(4) / 3).dtype, BF16),
    (lambda: (2.0 ** torch.arange(4)).dtype, BF16),
    (lambda: nn.Linear(2, 3).bias.dtype, BF16),
    (lambda: nn.Parameter(torch.ones(3)).dtype, BF16),
    (lambda: torch.zeros(2, dtype=F32).dtype, F32),
    (lambda: torch.arange(4).float().dtype, F32),
    (lambda: torch.arange(4).to(F32).dtype, F32),
    (lambda: (torch.ones(2, dtype=F32) * 2).dtype, F32),
    (lambda: torch.stack([torch.ones(2, dtype=F32)]).dtype, F32),
    (lambda: torch.tensor(np.ones(2, dtype=np.float32)).dtype, F32),
    (lambda: torch.arange(4).dtype, torch.int64),
    (lambda: torch.ones(2, dtype=torch.float64).dtype, torch.float64),
]


@pytest.mark.parametrize(("make", "dtype"), MADE)
def test_what_gets_it_is_what_gets_torchs_own(make: Callable[[], Any], dtype: torch.dtype) -> None:
    with local_torch_dtype(BF16):
        assert make() is dtype
    with own_default_dtype(), local_torch_dtype(BF16):
        assert make() is dtype
    assert torch.get_default_dtype() is F32


def test_another_thread_does_not_notice() -> None:
    def look() -> tuple[torch.dtype, torch.dtype]:
        torch.set_default_dtype(F32)  # its own, the process's: nobody else's
        return torch.get_default_dtype(), torch.ones(1).dtype

    with ThreadPoolExecutor(1) as other, own_default_dtype(), local_torch_dtype(BF16):
        assert other.submit(look).result() == (F32, F32)
        assert torch.ones(1).dtype is BF16


def test_while_a_skeleton_is_built_another_thread_computes_as_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    building, looked = threading.Event(), threading.Event()
    register = nn.Module.register_buffer

    def pause(*args: Any, **kwargs: Any) -> None:
        building.set()
        assert looked.wait(30)
        register(*args, **kwargs)

    def look() -> tuple[torch.dtype, torch.dtype]:
        assert building.wait(30)
        found = torch.get_default_dtype(), (torch.arange(3) / 2).dtype
        looked.set()
        return found

    monkeypatch.setattr(nn.Module, "register_buffer", pause)
    with ThreadPoolExecutor(1) as other:
        found = other.submit(look)
        model = build_skeleton(tiny_config("xglm"), dtype=BF16)

    assert found.result() == (F32, F32)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {BF16}


@pytest.mark.parametrize("model_type", ["xglm", "openai-gpt", "zamba", "gemma3n_text", "apertus"])
def test_a_skeleton_has_the_dtypes_that_transformers_builds(model_type: str) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=BF16)

    ours = build_skeleton(tiny_config(model_type), dtype=BF16)

    expected = {n: t.dtype for n, t in (*theirs.named_parameters(), *theirs.named_buffers())}
    assert {n: t.dtype for n, t in (*ours.named_parameters(), *ours.named_buffers())} == expected


def test_torch_has_its_own_again_after_a_model_that_can_not_be_built() -> None:
    config = tiny_config("llama")
    config.hidden_size = -1
    before = torch.get_default_dtype, torch.set_default_dtype

    with pytest.raises(CheckpointError, match="no model can be built"):
        build_skeleton(config, dtype=BF16)

    assert (torch.get_default_dtype, torch.set_default_dtype) == before
    assert torch.empty(1).dtype is F32
