"""What a checkpoint is made of: facts of how far training is, and the state of everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from splitlearn_core.checkpoint.training import archive, random_states, shards, stateful
from splitlearn_core.checkpoint.training.archive import Content
from splitlearn_core.checkpoint.training.encoding import encode
from splitlearn_core.checkpoint.training.exchange import Ranks
from splitlearn_core.checkpoint.training.sampler import ResumableSampler
from splitlearn_core.checkpoint.training.world import Batches
from splitlearn_core.headers import listed

RANDOM, VALUES = "random", "values"
"""What a rank's own state is made of."""

SHARDED = "sharded"
"""The kind of what ranks have shares of."""


@dataclass(frozen=True)
class Facts:
    """What is known of how far training is."""

    step: int
    epoch: int
    consumed_samples: int | None
    world_size: int
    batches: Batches | None

    @classmethod
    def of(
        cls,
        step: int,
        epoch: int | None,
        consumed: int | None,
        batches: Batches | None,
        sampler: Any,
        ranks: Ranks,
    ) -> Facts:
        """Take what the sampler knows where the caller has said nothing.

        Raises:
            ValueError: A number is none, or the two say different things.
        """
        if isinstance(sampler, ResumableSampler):
            epoch = sampler.epoch if epoch is None else epoch
            consumed = sampler.total_consumed if consumed is None else consumed
            batches = sampler.batches if batches is None else batches
        for name, number in (("step", step), ("epoch", epoch), ("consumed_samples", consumed)):
            if number is not None and (type(number) is not int or number < 0):
                raise ValueError(f"{name} must be a whole number from 0 on, not {number!r}")
        if batches is not None and batches.world_size != ranks.world_size:
            raise ValueError(f"{batches} is not of the {ranks.world_size} ranks that save")
        return cls(step, epoch or 0, consumed, ranks.world_size, batches)


def check_names(things: Mapping[str, Any]) -> None:
    """Refuse names that a checkpoint has for itself."""
    if wrong := archive.RESERVED & things.keys():
        raise ValueError(f"{listed(wrong)} is a name of the checkpoint's own; take another")


def rank_state(values: Any) -> dict[str, Any]:
    """Return what is this rank's own."""
    return {RANDOM: random_states.capture(), VALUES: values}


def content_of(things: Mapping[str, Any], facts: Facts, run_id: str | None) -> Content:
    """Take the state of everything apart."""
    sharded = shards.sharded_names(things)
    parts = {
        name: encode(stateful.state_of(name, thing), name)
        for name, thing in things.items()
        if name not in sharded
    }
    described = {
        name: {
            "kind": SHARDED if name in sharded else stateful.kind_of(name, thing),
            "class": stateful.class_of(thing),
        }
        for name, thing in things.items()
    }
    training = {
        **asdict(facts),
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": archive.versions(),
        "things": described,
    }
    return Content(facts.step, training, parts)
