"""A small training run with everything that has a state: what an interruption must not change."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from splitlearn_core.checkpoint.resume import Checkpointer
from splitlearn_core.checkpoint.training.sampler import ResumableSampler

SAMPLES = 40
WIDTH = 6


class Samples(Dataset[torch.Tensor]):
    """Numbers that are drawn when they are asked for; notes who was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        self.asked.append(index)
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


class Network(nn.Module):
    """Dropout, batch norm, and tied weights."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return [batch, width]."""
        hidden = nn.functional.dropout(self.norm(self.first(values)).relu(), 0.3, self.training)
        out: torch.Tensor = self.last(hidden)
        return out


@dataclass
class Run:
    """One process's training."""

    workers: int = 0
    accumulation: int = 2
    width: int = WIDTH
    seed: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - the global one is what is saved
        self.model: nn.Module = Network(self.width)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.02, total_steps=100
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        self.samples = Samples()
        self.sampler = ResumableSampler(
            self.samples, 3, accumulation=self.accumulation, seed=5, rank=0, world_size=1
        )
        self.loader = DataLoader(self.samples, batch_sampler=self.sampler, num_workers=self.workers)
        self.step = 0

    @property
    def things(self) -> dict[str, Any]:
        """What is saved and loaded."""
        names = ("model", "optimizer", "scheduler", "scaler", "sampler")
        return {name: getattr(self, name) for name in names}

    def train(self, steps: int) -> list[float]:
        """Take so many steps; return the loss of each of all steps so far."""
        until = self.step + steps
        while self.step < until:
            for batch in self.sampler.track(self.loader):
                self._forward(batch)
                if self.sampler.at_step:
                    self._step()
                    if self.step == until:
                        break
        return self.losses

    def save(self, checkpointer: Checkpointer, **more: Any) -> Any:
        """Save everything."""
        return checkpointer.save(step=self.step, **self.things, losses=self.losses, **more)

    def load(self, checkpointer: Checkpointer, **more: Any) -> Any:
        """Load everything."""
        state = checkpointer.load(**self.things, **more)
        self.step, self.losses = state.step, list(state.values["losses"])
        return state

    def _forward(self, batch: torch.Tensor) -> None:
        noise = torch.randn(()) + random.random() + np.random.rand()  # noqa: NPY002, S311
        loss = (self.model(batch) - batch * noise).square().mean() / self.sampler.accumulation
        self.scaler.scale(loss).backward()
        self._loss = getattr(self, "_loss", 0.0) + float(loss.detach())

    def _step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.losses = [*self.losses, self._loss]
        self._loss = 0.0
        self.step += 1
