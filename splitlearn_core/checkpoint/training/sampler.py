"""Which samples come next, on every rank: an order that can be gone on with from anywhere.

An epoch's order comes from a seed and the epoch's number alone, so that to skip what was consumed
is to begin further on in it: nothing is loaded for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler

from splitlearn_core.checkpoint.training.exchange import Ranks
from splitlearn_core.checkpoint.training.world import Batches
from splitlearn_core.errors import CheckpointError, WorldSizeError

T = TypeVar("T")

_VERSION = 1


class ResumableSampler(Sampler[list[int]]):
    """A batch sampler for `DataLoader(dataset, batch_sampler=…)` that knows how far training is.

    Of an epoch's order each step takes the next `batch_size * accumulation * world_size` samples:
    the first forward of all ranks the first `batch_size * world_size`, rank 0 the first of these.
    So a step takes the same samples on any number of ranks, as long as their product is the same.
    What is left at the end of an epoch, and makes no whole step, is not used in it.

    A loop looks so, and can be left and gone on with at any step:

        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
        while sampler.epoch < epochs:
            for batch in sampler.track(loader):
                (loss(batch) / sampler.accumulation).backward()
                if sampler.at_step:
                    optimizer.step()
                    …
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int,
        *,
        accumulation: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Begin with the first epoch.

        Args:
            data: What is sampled from, or its length.
            batch_size: Samples in one forward of one rank.
            accumulation: Forwards whose gradients make one step.
            seed: Of all epochs' orders; the same on every rank.
            shuffle: Whether an epoch's order is random.
            rank: This process's; `None`: torch.distributed's, or 0.
            world_size: `None`: torch.distributed's, or 1.

        Raises:
            ValueError: A number is out of range, or the data make no whole step.
        """
        here = Ranks.here()
        self._length = data if isinstance(data, int) else len(data)
        self._rank = here.rank if rank is None else rank
        self.batches = Batches(
            batch_size, accumulation, here.world_size if world_size is None else world_size
        )
        self._seed = seed
        self._shuffle = shuffle
        self._forwards = 0
        self.epoch = 0
        self.consumed = 0
        self._before = 0
        if not 0 <= self._rank < self.batches.world_size:
            raise ValueError(f"rank {self._rank} is none of {self.batches.world_size}")
        if self._length < self.batches.global_batch:
            raise ValueError(
                f"{self._length} samples make no step of {self.batches.global_batch}"
                f" ({self.batches})"
            )

    @property
    def accumulation(self) -> int:
        """Forwards whose gradients make one step."""
        return self.batches.accumulation

    @property
    def at_step(self) -> bool:
        """Whether the batch that `track` handed out last completes a step.

        Until then gradients can stay on their rank (`DistributedDataParallel.no_sync`).
        """
        return self._forwards % self.accumulation == 0

    @property
    def total_consumed(self) -> int:
        """Samples that all ranks were handed since the beginning, those of earlier epochs too."""
        return self._before + self.consumed

    def __len__(self) -> int:
        """Return the number of batches that the epoch still has for this rank."""
        return (self._length - self.consumed) // self.batches.global_batch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the epoch's remaining batches of this rank; changes nothing."""
        order = self._order()[self.consumed :]
        size = self.batches.batch_size
        for number in range(len(self)):
            start = (number * self.batches.world_size + self._rank) * size
            yield order[start : start + size].tolist()

    def track(self, loader: DataLoader[T]) -> Iterator[T]:
        """Yield what a loader makes of the epoch's remaining batches, and count them.

        A batch counts as consumed when it is handed out, however many workers have prepared more.
        The loader draws the seed of its workers from a generator of its own, so that to begin again
        in the middle of an epoch draws nothing from torch's.

        Args:
            loader: With this sampler as its `batch_sampler`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed + self.epoch)  # no accelerator's
            batches = iter(loader)
        each = self.batches.batch_size * self.batches.world_size
        for batch in batches:
            self._forwards += 1
            self.consumed += each
            yield batch
        self._before += self.consumed
        self.epoch, self.consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where training is.

        Raises:
            RuntimeError: It is amid the forwards of one step, whose gradients no state holds.
        """
        if not self.at_step:
            done = self._forwards % self.accumulation
            raise RuntimeError(
                f"{done} of the {self.accumulation} forwards of a step are done, and their"
                " gradients are in no checkpoint: save after optimizer.step(), when"
                " sampler.at_step is true"
            )
        return {
            "version": _VERSION,
            "length": self._length,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "before": self._before,
            "batch_size": self.batches.batch_size,
            "accumulation": self.batches.accumulation,
            "world_size": self.batches.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off; its seed and accumulation hold from here on.

        Raises:
            CheckpointError: (a `ValueError`) It was of other data, or is no state of a sampler.
            WorldSizeError: (a `ValueError`) It was of another number of ranks, or batch size, and
                was not converted: `Checkpointer.load` does that.
        """
        batches = batches_of(state)
        mine = self.batches
        if state["version"] != _VERSION:
            raise CheckpointError(
                f"a sampler's state of version {state['version']}, not {_VERSION}"
            )
        for name, value in (("length", self._length), ("shuffle", self._shuffle)):
            if state[name] != value:
                raise CheckpointError(
                    f"the sampler was saved with {name} {state[name]}, and this one has {value}:"
                    " other data can't be gone on with in the middle"
                )
        if (batches.batch_size, batches.world_size) != (mine.batch_size, mine.world_size):
            raise WorldSizeError(
                f"the sampler was saved with {batches}, and this one has {mine}: load it with"
                " Checkpointer.load, which converts it"
            )
        self.batches = batches
        self._seed = state["seed"]
        self._forwards = 0
        self.epoch, self.consumed, self._before = state["epoch"], state["consumed"], state["before"]

    def _order(self) -> torch.Tensor:
        """Return the indices of all samples in this epoch's order."""
        if not self._shuffle:
            return torch.arange(self._length)
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        return torch.randperm(self._length, generator=generator)


def batches_of(state: dict[str, Any]) -> Batches:
    """Return the batches that a sampler's state is of.

    Raises:
        CheckpointError: (a `ValueError`) It is no state of a sampler.
    """
    try:
        return Batches(state["batch_size"], state["accumulation"], state["world_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"this is no state of a ResumableSampler: {error!r}") from error


def with_batches(state: dict[str, Any], batches: Batches) -> dict[str, Any]:
    """Return a sampler's state at the same place in the data, with other batches."""
    return {
        **state,
        "batch_size": batches.batch_size,
        "accumulation": batches.accumulation,
        "world_size": batches.world_size,
    }
