"""Which samples a step takes, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from splitlearn_core.checkpoint.training.sampler import ResumableSampler
from splitlearn_core.errors import CheckpointError, WorldSizeError

Steps = list[set[int]]


def steps_of(samplers: list[ResumableSampler], count: int) -> Steps:
    """Return the samples of each of the next steps, of all ranks, taken over epochs."""
    taken: list[list[set[int]]] = []
    for sampler in samplers:
        loader: DataLoader[Any] = DataLoader(torch.arange(1000), batch_sampler=sampler)  # type: ignore[arg-type]
        mine: list[set[int]] = [set()]
        while len(mine) <= count:
            for batch in sampler.track(loader):
                mine[-1] |= set(batch.tolist())
                if sampler.at_step:
                    mine.append(set())
                    if len(mine) > count:
                        break
        taken.append(mine[:count])
    return [set().union(*step) for step in zip(*taken, strict=True)]


def samplers(world: int, size: int, accumulation: int, **more: Any) -> list[ResumableSampler]:
    return [
        ResumableSampler(
            50, size, accumulation=accumulation, seed=3, rank=rank, world_size=world, **more
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "size", "times"), [(1, 12, 1), (2, 3, 2), (3, 2, 2), (6, 1, 2)])
def test_a_step_takes_the_same_samples_on_any_number_of_ranks(
    world: int, size: int, times: int
) -> None:
    assert steps_of(samplers(world, size, times), 9) == steps_of(samplers(1, 4, 3), 9)


def test_an_epoch_takes_no_sample_twice_and_each_has_an_order_of_its_own() -> None:
    steps = steps_of(samplers(2, 5, 1), 10)

    first, second = steps[:5], steps[5:]
    assert set().union(*first) == set(range(50)) == set().union(*second)
    assert first != second


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert steps_of(samplers(2, 2, 1, shuffle=False), 2) == [{0, 1, 2, 3}, {4, 5, 6, 7}]


@given(st.integers(0, 14), st.sampled_from([(1, 12, 1), (2, 3, 2), (3, 2, 2), (12, 1, 1)]))
def test_going_on_from_any_step(done: int, shape: tuple[int, int, int]) -> None:
    whole = steps_of(samplers(*shape), done + 3)
    first = samplers(*shape)
    steps_of(first, done)
    again = samplers(*shape)

    for one, other in zip(again, first, strict=True):
        one.load_state_dict(other.state_dict())

    assert steps_of(again, 3) == whole[done:]


def test_to_begin_again_draws_nothing_from_torch() -> None:
    sampler = samplers(1, 5, 1)[0]
    loader: DataLoader[Any] = DataLoader(torch.arange(50), batch_sampler=sampler)  # type: ignore[arg-type]
    before = torch.get_rng_state()

    next(sampler.track(loader))
    list(sampler.track(loader))

    assert torch.equal(torch.get_rng_state(), before)


def test_what_makes_no_whole_step_is_left_out() -> None:
    sampler = samplers(1, 4, 3)[0]

    assert len(sampler) == 12
    assert len(list(sampler)) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 is none of 2"),
        ({"batch_size": 51}, "50 samples make no step of 51"),
        ({"accumulation": 0}, "accumulation must be a whole number from 1 on"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableSampler(50, **{"batch_size": 2, **given})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"world_size": 3}, WorldSizeError, r"saved with Batches\(.*world_size=3\).*converts it"),
        ({"length": 9}, CheckpointError, "length 9, and this one has 50"),
        ({"version": 7}, CheckpointError, "version 7, not 1"),
        ({"batch_size": "a"}, CheckpointError, "no state of a ResumableSampler"),
    ],
)
def test_states_of_others(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    sampler = samplers(1, 5, 1)[0]
    state = {**sampler.state_dict(), **change}

    with pytest.raises(kind, match=message):
        sampler.load_state_dict(state)
