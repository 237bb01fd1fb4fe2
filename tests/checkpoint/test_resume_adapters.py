"""An adapter on a part is trained, saved without what is frozen, and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from splitlearn_core.checkpoint import Checkpointer, add_lora, load_checkpoint
from splitlearn_core.errors import CheckpointError
from splitlearn_core.factory import load_component


def adapted(checkpoint: Path, rank: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a Trunk with an adapter that is trained."""
    part = load_component(checkpoint, "trunk", [2, 4], mmap=False).train()
    torch.manual_seed(0)
    add_lora(part, rank=rank, dropout=0.1)
    trained = [p for p in part.parameters() if p.requires_grad]
    return part, torch.optim.AdamW(trained, lr=0.05)


def steps(part: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = part(torch.randn(1, 3, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_an_adapter_goes_on_to_the_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    part, optimizer = adapted(tiny_checkpoint)
    steps(part, optimizer, 2)
    with Checkpointer(tmp_path) as checkpointer:
        path = checkpointer.save(step=2, adapter=part, optimizer=optimizer)
    expected = steps(part, optimizer, 3)
    assert path is not None

    other, again = adapted(tiny_checkpoint)
    torch.manual_seed(77)
    load_checkpoint(tmp_path, adapter=other, optimizer=again)

    assert steps(other, again, 3) == expected
    with safe_open(path / "adapter.safetensors", "pt") as file:
        names = list(file.keys())
    assert names
    assert all("lora_" in name for name in names)


def test_an_adapter_of_another_rank_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    part, _ = adapted(tiny_checkpoint)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(step=2, adapter=part)
    other, _ = adapted(tiny_checkpoint, rank=3)

    with pytest.raises(CheckpointError, match=r"is not of this adapter: .*float32 \[2, 32\] in"):
        load_checkpoint(tmp_path, adapter=other)
