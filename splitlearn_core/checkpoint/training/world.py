"""Going on at another number of ranks: the arithmetic of the two ways, and what can't be exact.

*Constant global batch*: a step takes as many samples as before.  Fewer ranks each accumulate the
gradients of more forwards; the count of steps, the schedule and the loss curve go on.

*Constant batch per rank*: a rank takes as many samples in a step as before, so that a step of all
takes more or fewer, and the count of steps is converted: 1,000 steps on 4 ranks are 2,000 on 2.
Only the samples that were consumed stay the same; the curve does not go on exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from splitlearn_core.errors import WorldSizeError

Policy = Literal["constant_global_batch", "constant_batch_per_rank"]
"""What stays the same when the number of ranks changes."""

POLICIES: tuple[str, ...] = get_args(Policy)


@dataclass(frozen=True)
class Batches:
    """How many samples a step takes.

    Attributes:
        batch_size: In one forward of one rank.
        accumulation: Forwards whose gradients make one step.
        world_size: Ranks.
    """

    batch_size: int
    accumulation: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "world_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")

    @property
    def global_batch(self) -> int:
        """Samples in one step, of all ranks."""
        return self.batch_size * self.accumulation * self.world_size


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Attributes:
        step: Steps of the optimizer that were taken.
        batches: What each takes; `None` where it was not told.
        world_size: Ranks.
    """

    step: int
    world_size: int
    batches: Batches | None = None


@dataclass(frozen=True)
class Converted:
    """How training goes on.

    Attributes:
        progress: At the new number of ranks.
        notes: What is not as it would have been, in words.
    """

    progress: Progress
    notes: tuple[str, ...] = ()


def convert(
    saved: Progress, world_size: int, policy: str | None, batch_size: int | None = None
) -> Converted:
    """Return how training goes on at `world_size` ranks.

    Args:
        saved: As it was.
        world_size: Ranks that there are now.
        policy: One of `POLICIES`; needed where the number differs, or the batch size.
        batch_size: Samples in a forward of a rank now; as it was where left out.

    Raises:
        ValueError: There is no such policy.
        WorldSizeError: (a `ValueError`) The number differs and no policy is named, or what it asks
            for can't be.
    """
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"no policy {policy!r}; there are {' and '.join(POLICIES)}")
    other_batch = bool(saved.batches and batch_size and batch_size != saved.batches.batch_size)
    if world_size == saved.world_size and not other_batch:
        return Converted(saved)
    if policy == "constant_global_batch":
        return _keep_global_batch(saved, world_size, batch_size)
    if other_batch and saved.batches:
        raise WorldSizeError(
            f"a rank took {saved.batches.batch_size} samples in a forward, and takes {batch_size}"
            " now: only on_world_change='constant_global_batch' can go on so"
        )
    if policy is None:
        raise WorldSizeError(_which_policy(saved, world_size))
    return _keep_batch_per_rank(saved, world_size)


def _which_policy(saved: Progress, world_size: int) -> str:
    return (
        f"this was saved by {_ranks(saved.world_size)}, and there {_are(world_size)} now: name what"
        " is to stay the same, on_world_change='constant_global_batch' (a step takes as many"
        " samples as before: gradients are accumulated, steps and schedule go on) or"
        " 'constant_batch_per_rank' (a rank takes as many in a step as before: step"
        f" {saved.step} becomes {saved.step * saved.world_size / world_size:g}, and the loss curve"
        " is another)"
    )


def _keep_global_batch(saved: Progress, world_size: int, batch_size: int | None) -> Converted:
    """Share the samples of a step out over the ranks that there are."""
    if saved.batches is None:
        return _keep_untold_batch(saved, world_size)
    had = saved.batches
    each = batch_size or had.batch_size
    accumulation, rest = divmod(had.global_batch, each * world_size)
    if rest:
        raise WorldSizeError(_does_not_divide(had, world_size, each))
    note = (
        f"{_ranks(saved.world_size)} became {world_size}: a step still takes {had.global_batch}"
        f" samples, {each} in each of {accumulation} forwards of a rank, before {had.batch_size} in"
        f" each of {had.accumulation}; sums are made in another order, so that the last bits differ"
    )
    batches = Batches(each, accumulation, world_size)
    return Converted(Progress(saved.step, world_size, batches), (note,))


def _keep_untold_batch(saved: Progress, world_size: int) -> Converted:
    """Where nothing is known of samples, only a divisor of the number of ranks can do."""
    times, rest = divmod(saved.world_size, world_size)
    if rest or not times:
        raise WorldSizeError(
            f"{_ranks(saved.world_size)} can't become {world_size} with a constant global batch:"
            " nothing was saved of how many samples a step takes.  Save the sampler, or"
            " batches=Batches(…), with the rest; or go on with a number of ranks that divides"
            f" {saved.world_size}"
        )
    note = (
        f"{_ranks(saved.world_size)} became {world_size}: accumulate {times} times as many forwards"
        " for a step as before, for a constant global batch"
    )
    return Converted(Progress(saved.step, world_size), (note,))


def _does_not_divide(had: Batches, world_size: int, each: int) -> str:
    total = had.global_batch
    sizes = [n for n in range(1, total + 1) if total % (n * world_size) == 0]
    worlds = [n for n in range(1, total + 1) if total % (n * each) == 0]
    ways = [f"give the sampler a batch_size of {_listed(sizes)}"] if sizes else []
    ways += [f"run {_listed(worlds)} ranks"] if worlds else []
    return (
        f"the global batch of {total} samples can't be shared out over {_ranks(world_size)} with"
        f" {each} in a forward of each: {each * world_size} does not divide it"
        + (f"; {', or '.join(ways)}" if ways else "")
    )


def _keep_batch_per_rank(saved: Progress, world_size: int) -> Converted:
    """Convert the count of steps, as the samples that were consumed say."""
    batches_done = saved.step * saved.world_size
    step, rest = divmod(batches_done, world_size)
    batches = replace(saved.batches, world_size=world_size) if saved.batches else None
    note = (
        f"{_ranks(saved.world_size)} became {world_size}: step {saved.step} became {step}, and a"
        f" step takes {world_size}/{saved.world_size} of the samples that it took; what a scheduler"
        " counts is as it was saved, and the loss curve is another"
    )
    cut = ""
    if rest:
        cut = (
            f"step {saved.step} of {_ranks(saved.world_size)} would be"
            f" {batches_done / world_size:g} of {world_size}: {rest} of the {world_size} batches of"
            " a step are consumed already.  They don't come again, and count as no step"
        )
    return Converted(Progress(step, world_size, batches), (note, cut) if cut else (note,))


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _listed(numbers: list[int], limit: int = 12) -> str:
    shown = [str(n) for n in numbers[:limit]]
    return ", ".join(shown[:-1]) + (" or " if shown[:-1] else "") + shown[-1]
