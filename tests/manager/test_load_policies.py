"""The pure parts of how patient loads are: deadlines, retries, pace; and who goes to make room."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitlearn_core.errors import HubUnreachableError, ModelSourceError
from splitlearn_core.loading.stages import LoadStage, enter_stage
from splitlearn_manager.core.deadlines import GIB, LoadClock, LoadDeadlines
from splitlearn_manager.core.eviction import Candidate, choose, least_recently_used
from splitlearn_manager.core.progress import LoadProgress, Pace
from splitlearn_manager.core.retry import RetryPolicy, may_heal
from splitlearn_manager.core.states import LoadPhase
from splitlearn_manager.errors import LoadTimeoutError

DEADLINES = LoadDeadlines(stall=10, base=100, per_gib=20)


def test_a_load_may_take_longer_the_larger_it_is() -> None:
    assert DEADLINES.total(0) == 100
    assert DEADLINES.total(3 * GIB) == 160


def test_a_load_that_moves_is_given_up_only_by_its_size() -> None:
    clock = LoadClock(DEADLINES, now=1000)

    for second in range(0, 120, 5):
        assert clock.overdue(second, GIB, 1000 + second) is None
    assert clock.overdue("moved", GIB, 1120) == (
        f"was not done after 120 s, which is the limit for {GIB} bytes"
    )


def test_a_load_that_does_not_move_is_given_up_after_the_stall() -> None:
    clock = LoadClock(DEADLINES, now=1000)

    assert clock.overdue("first", 0, 1005) is None
    assert clock.overdue("first", 0, 1014.9) is None
    assert clock.overdue("second", 0, 1015) is None  # it moved, at the last moment
    assert clock.overdue("second", 0, 1025) == "made no progress for 10 s"


def test_waiting_for_a_turn_does_not_count() -> None:
    clock = LoadClock(DEADLINES, now=0)

    clock.pause(5000)

    assert clock.overdue("first", 0, 5000) is None
    assert clock.overdue("first", 0, 5009) is None
    assert clock.overdue("first", 0, 5010) is not None


def test_waits_between_attempts_grow_up_to_the_longest() -> None:
    policy = RetryPolicy(attempts=5, first=2, longest=50)

    assert [policy.pause(failures) for failures in (1, 2, 3, 4)] == [2, 8, 32, 50]
    assert policy.pause(10**6) == 50


@pytest.mark.parametrize("failures", [1, 2])
def test_what_failed_together_is_not_tried_together(failures: int) -> None:
    policy = RetryPolicy(attempts=3, first=4, longest=300)

    waits = {policy.delay(failures, ConnectionError()) for _ in range(50)}

    assert len(waits) > 1
    assert all(0.75 * policy.pause(failures) <= wait <= policy.pause(failures) for wait in waits)


def test_the_last_attempt_is_the_last() -> None:
    assert RetryPolicy(attempts=3).delay(3, ConnectionError()) is None
    assert RetryPolicy(attempts=1).delay(1, ConnectionError()) is None


@pytest.mark.parametrize(
    ("error", "heals"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (LoadTimeoutError("it hung"), False),
        (MemoryError(), False),
        (FileNotFoundError(), False),
        (ModelSourceError("no such model"), False),
        (HubUnreachableError("no answer"), True),
        (OSError(28, "no space left"), False),
        (ValueError(), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_only_the_network_heals_by_itself(error: BaseException, heals: bool) -> None:
    assert may_heal(error) is heals
    assert (RetryPolicy().delay(1, error) is not None) is heals


def test_pace_is_of_the_last_seconds() -> None:
    pace = Pace(span=10)
    assert (pace.rate(), pace.seconds_left(100)) == (None, None)
    for second in range(20):
        pace.sample(second, 100 * second if second < 10 else 1000 + 10 * (second - 10))

    assert pace.rate() == pytest.approx(19, abs=1)  # from second 9: 100 at once, then 10 each
    assert pace.seconds_left(190) == pytest.approx(10, abs=1)
    assert pace.seconds_left(0) == 0


def test_pace_begins_anew_with_another_attempt() -> None:
    pace = Pace()
    pace.sample(0, 1000)
    pace.sample(1, 2000)
    pace.sample(2, 50)

    assert pace.rate() is None
    pace.sample(3, 150)
    assert pace.rate() == 100


def test_pace_of_what_stands_still_says_nothing_of_the_end() -> None:
    pace = Pace()
    pace.sample(0, 7)
    pace.sample(1, 7)

    assert pace.rate() == 0
    assert pace.seconds_left(100) is None


def test_pace_of_two_looks_in_the_same_instant_is_not_known() -> None:
    pace = Pace()
    pace.sample(5, 0)
    pace.sample(5, 100)

    assert pace.rate() is None


@example([(0.0, 0), (5e-324, 1)])
@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 10**12)), max_size=40))
def test_pace_never_goes_backwards_or_grows_without_bound(steps: list[tuple[float, int]]) -> None:
    pace, now = Pace(span=10), 0.0
    for pause, nbytes in steps:
        now += pause
        pace.sample(now, nbytes)
        rate = pace.rate()
        assert rate is None or (rate >= 0 and math.isfinite(rate))
        assert all(time >= now - 10 for time, _ in pace._samples)


@pytest.mark.parametrize("stage", LoadStage)
def test_a_stage_of_the_core_is_a_phase(stage: LoadStage) -> None:
    progress = LoadProgress()

    enter_stage(progress, stage)

    assert progress.phase == stage.value


def test_progress_can_be_stopped_once() -> None:
    progress = LoadProgress()
    progress(1, 10)
    progress.enter(LoadPhase.READING)
    first = ValueError("first")
    progress.stop(first)
    progress.stop(ValueError("second"))

    for report in (lambda: progress(2, 10), lambda: progress.enter(LoadPhase.WARMING_UP)):
        with pytest.raises(ValueError, match="first"):
            report()
    assert progress.mark() == (LoadPhase.WARMING_UP, 2, 10)


def candidates(*sizes: int) -> list[Candidate]:
    """Return models of these sizes, used in this order."""
    return [Candidate(f"m{n}", size, float(n)) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "nbytes", "chosen"),
    [
        ((), 1, []),
        ((5, 5, 5), 0, []),
        ((5, 5, 5), 1, ["m0"]),
        ((5, 5, 5), 10, ["m0", "m1"]),
        ((5, 5, 5), 16, []),  # all of them would not do
        ((1, 100), 50, ["m1"]),  # the small one would go in vain
        ((1, 2, 100), 102, ["m1", "m2"]),
        ((0, 5), 5, ["m1"]),  # one that has nothing stays
        ((10, 3, 4), 12, ["m0", "m1"]),
    ],
)
def test_the_least_recently_used_go_and_none_in_vain(
    sizes: tuple[int, ...], nbytes: int, chosen: list[str]
) -> None:
    assert choose(candidates(*sizes), nbytes) == chosen
    assert choose(reversed(candidates(*sizes)), nbytes) == chosen


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 400))
def test_a_choice_is_enough_and_has_nothing_to_spare(sizes: list[int], nbytes: int) -> None:
    of = {c.model_id: c.nbytes for c in candidates(*sizes)}

    chosen = choose(candidates(*sizes), nbytes)

    if sum(sizes) < nbytes:
        assert chosen == []
    else:
        total = sum(of[name] for name in chosen)
        assert total >= nbytes
        assert all(total - of[name] < nbytes for name in chosen)


@pytest.mark.parametrize(
    ("count", "chosen"), [(0, []), (1, ["m0"]), (2, ["m0", "m1"]), (3, ["m0", "m1", "m2"]), (4, [])]
)
def test_places_are_of_the_least_recently_used(count: int, chosen: list[str]) -> None:
    ordered: Any = reversed(candidates(1, 1, 1))

    assert least_recently_used(ordered, count) == chosen
