"""Train a small Llama on real text, and go on wherever the last run ended, on one rank or several.

    scripts/train_resumable.py runs/a --steps 300
    torchrun --nproc-per-node 2 scripts/train_resumable.py runs/a --steps 300

Kill it at any time, and start it again, with another number of ranks if you like: it ends with the
loss that it would have had.  The text is the reference of the language that ships with Python.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from splitlearn_core.checkpoint import Checkpointer, ResumableSampler
from splitlearn_core.sharded import joined_group

WINDOW = 48
"""Bytes of text in a sample."""

GLOBAL_BATCH = 8
"""Samples in a step, on any number of ranks."""

_MOST_IN_A_FORWARD = 4
_BYTES = 256


@dataclass(frozen=True)
class Settings:
    """What a run is.

    Attributes:
        folder: Of its checkpoints; `losses.json` comes there at the end.
        steps: After which it ends.
        every: Steps between two checkpoints.
        dropout: Of attention; with it, another number of ranks draws other numbers.
        background: Whether training goes on while a checkpoint is written.
    """

    folder: Path
    steps: int = 300
    every: int = 20
    dropout: float = 0.0
    background: bool = True


class Text(Dataset[torch.Tensor]):
    """Windows of the text, as bytes."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        self._bytes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._bytes) // WINDOW

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._bytes[index * WINDOW :][:WINDOW].long()


class Training:
    """One process's share of a run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(0)
        self._model = _small_llama(settings.dropout)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, settings.steps
        )
        text = Text()
        size = min(_MOST_IN_A_FORWARD, GLOBAL_BATCH // self._ranks)
        self._sampler = ResumableSampler(
            text, size, accumulation=GLOBAL_BATCH // (size * self._ranks), seed=0
        )
        self._loader: DataLoader[torch.Tensor] = DataLoader(text, batch_sampler=self._sampler)
        self._wrapped: nn.Module = (
            DistributedDataParallel(self._model) if dist.is_initialized() else self._model
        )
        self._step = 0
        self._losses: list[float] = []

    def run(self, progress: Callable[[int], None]) -> list[float]:
        """Go on from the last checkpoint, to the end; return the loss of every step.

        Args:
            progress: Called after each step.
        """
        with Checkpointer(self._settings.folder, keep_last=2, timeout=60) as checkpointer:
            if checkpointer.latest() is not None:
                self._load(checkpointer)
            for loss in self._remaining_steps():
                self._losses.append(loss)
                self._step += 1
                if self._step % self._settings.every == 0:
                    self._save(checkpointer)
                progress(self._step)
        return self._losses

    def _remaining_steps(self) -> Iterator[float]:
        """Take one step after the other; yield the loss of each."""
        while self._step < self._settings.steps:
            loss = torch.zeros(())
            for batch in self._sampler.track(self._loader):
                loss += self._forward_and_backward(batch)
                if self._sampler.at_step:
                    self._optimizer.step()
                    self._scheduler.step()
                    self._optimizer.zero_grad()
                    yield self._mean(loss)
                    if self._step == self._settings.steps:
                        return
                    loss = torch.zeros(())

    def _forward_and_backward(self, batch: torch.Tensor) -> torch.Tensor:
        with self._gradients_kept_here():
            loss = self._wrapped(batch, labels=batch).loss / self._sampler.accumulation
            loss.backward()
        kept: torch.Tensor = loss.detach()
        return kept

    def _gradients_kept_here(self) -> AbstractContextManager[None]:
        """Let gradients stay on this rank until the last forward of a step."""
        if isinstance(self._wrapped, DistributedDataParallel) and not self._sampler.at_step:
            return self._wrapped.no_sync()
        return nullcontext()

    def _mean(self, loss: torch.Tensor) -> float:
        """Return the mean over all ranks."""
        if dist.is_initialized():
            dist.all_reduce(loss)
        return float(loss) / self._ranks

    @property
    def _things(self) -> dict[str, Any]:
        return {
            "model": self._wrapped,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "sampler": self._sampler,
        }

    def _save(self, checkpointer: Checkpointer) -> None:
        checkpointer.save(
            step=self._step,
            background=self._settings.background,
            losses=self._losses,
            **self._things,
        )

    def _load(self, checkpointer: Checkpointer) -> None:
        state = checkpointer.load(on_world_change="constant_global_batch", **self._things)
        self._step, self._losses = state.step, list(state.values["losses"])


def _small_llama(dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=_BYTES,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        max_position_embeddings=WINDOW,
    )
    return LlamaForCausalLM(config).train()


def train(settings: Settings, progress: Callable[[int], None] = lambda _: None) -> list[float]:
    """Run to the end; rank 0 writes the losses."""
    losses = Training(settings).run(progress)
    if not dist.is_initialized() or dist.get_rank() == 0:
        text = json.dumps(losses)
        (settings.folder / "losses.json").write_text(text, encoding="utf-8")
    return losses


@contextmanager
def _ranks() -> Iterator[None]:
    """Join the others, where `torchrun` has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    with joined_group():
        yield


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--every", type=int, default=Settings.every, help="steps between saves")
    parser.add_argument("--dropout", type=float, default=Settings.dropout)
    given = parser.parse_args()
    settings = Settings(given.folder, given.steps, given.every, given.dropout)
    with _ranks():
        losses = train(settings, _say)
    print(f"loss of step {len(losses)}: {losses[-1]:.6f}")


def _say(step: int) -> None:
    if step % Settings.every == 0:
        print(f"step {step}", flush=True)


if __name__ == "__main__":
    main()
