"""The arithmetic of going on at another number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_core.checkpoint.training.world import Batches, Progress, convert
from splitlearn_core.errors import WorldSizeError

SIZES = st.integers(1, 12)


def test_nothing_changes_at_the_same_number() -> None:
    saved = Progress(7, 2, Batches(3, 1, 2))

    assert convert(saved, 2, None).progress == saved
    assert convert(saved, 2, "constant_batch_per_rank").notes == ()


def test_the_batch_per_rank_of_the_documents() -> None:
    converted = convert(Progress(1000, 4), 2, "constant_batch_per_rank")

    assert converted.progress.step == 2000
    assert "step 1000 became 2000" in converted.notes[0]
    assert len(converted.notes) == 1


def test_a_batch_that_is_cut_is_said() -> None:
    converted = convert(Progress(5, 1), 2, "constant_batch_per_rank")

    assert converted.progress.step == 2
    assert "1 of the 2 batches of a step are consumed already" in converted.notes[1]


def test_fewer_ranks_accumulate() -> None:
    converted = convert(Progress(9, 4, Batches(2, 1, 4)), 2, "constant_global_batch")

    assert converted.progress == Progress(9, 2, Batches(2, 2, 2))


def test_more_ranks_accumulate_less() -> None:
    converted = convert(Progress(9, 1, Batches(2, 4, 1)), 4, "constant_global_batch")

    assert converted.progress == Progress(9, 4, Batches(2, 1, 4))


def test_a_smaller_batch_is_accumulated_at_the_same_number() -> None:
    converted = convert(Progress(9, 2, Batches(4, 1, 2)), 2, "constant_global_batch", 1)

    assert converted.progress.batches == Batches(1, 4, 2)


@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_the_global_batch_stays_or_it_is_refused(
    size: int, accumulation: int, before: int, now: int, other: int
) -> None:
    saved = Progress(3, before, Batches(size, accumulation, before))
    try:
        found = convert(saved, now, "constant_global_batch", other)
    except WorldSizeError:
        assert saved.batches is not None
        assert saved.batches.global_batch % (other * now)
        return
    assert found.progress.batches is not None
    assert saved.batches is not None
    assert found.progress.batches.global_batch == saved.batches.global_batch
    assert found.progress.step == saved.step


@given(st.integers(0, 10**6), SIZES, SIZES)
def test_no_batch_is_lost_or_counted_twice(step: int, before: int, now: int) -> None:
    found = convert(Progress(step, before), now, "constant_batch_per_rank")

    left = step * before - found.progress.step * now
    assert 0 <= left < now
    assert (left > 0) == (len(found.notes) == 2)


def test_both_policies_are_offered_where_none_is_named() -> None:
    with pytest.raises(WorldSizeError, match=r"4 ranks.*are 2 now") as caught:
        convert(Progress(1000, 4), 2, None)

    assert "'constant_global_batch'" in str(caught.value)
    assert "'constant_batch_per_rank'" in str(caught.value)
    assert "2000" in str(caught.value)


def test_what_does_not_divide_says_what_would() -> None:
    with pytest.raises(WorldSizeError, match=r"8 samples.*over 3 ranks.*run 1, 2 or 4 ranks"):
        convert(Progress(1, 2, Batches(2, 2, 2)), 3, "constant_global_batch")


def test_a_batch_that_is_too_large_says_which_would_do() -> None:
    with pytest.raises(WorldSizeError, match="batch_size of 1 or 2, or run 1 or 2 ranks"):
        convert(Progress(1, 2, Batches(4, 1, 2)), 4, "constant_global_batch")


def test_an_untold_batch_needs_a_divisor() -> None:
    assert "accumulate 2 times" in convert(Progress(1, 4), 2, "constant_global_batch").notes[0]
    with pytest.raises(WorldSizeError, match=r"nothing was saved.*divides 4"):
        convert(Progress(1, 4), 3, "constant_global_batch")


def test_another_batch_size_needs_the_constant_global_batch() -> None:
    with pytest.raises(WorldSizeError, match="took 4 samples in a forward, and takes 2"):
        convert(Progress(1, 2, Batches(4, 1, 2)), 2, None, 2)


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="no policy 'same'; there are constant_global_batch and"):
        convert(Progress(1, 2), 2, "same")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_numbers_that_are_none(wrong: int) -> None:
    with pytest.raises(ValueError, match="whole number from 1 on"):
        Batches(wrong)
