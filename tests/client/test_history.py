"""What is kept of a session, and the policy by which it is tried to go on."""

from __future__ import annotations

import pytest

from splitlearn_manager.client.history import History, SentStep
from splitlearn_manager.config.retry import RetryPolicy
from splitlearn_manager.errors import ConfigError


def steps(*lengths: int, limit: int = 1000) -> History[str]:
    """Return the history of steps of so many positions."""
    history: History[str] = History(limit)
    for number, new in enumerate(lengths):
        history.add_step(b"x" * 10, sum(lengths[:number]), new, f"result {number}")
    return history


def kept(history: History[str]) -> list[object]:
    return [e.kept if isinstance(e, SentStep) else e.rows for e, _ in history]


def test_steps_are_kept_as_they_were() -> None:
    history = steps(5, 1, 1, 1, 1)

    assert kept(history) == [5, 1, 1, 1, 1]
    assert (len(history), history.nbytes) == (9, 50)


def test_results_of_the_first_and_the_last_steps_are_known() -> None:
    known = [result for _, result in steps(5, 1, 1, 1, 1)]

    assert known == ["result 0", None, None, "result 3", "result 4"]


def test_a_step_that_is_rolled_back_in_part_stays_whole() -> None:
    """Its positions were computed in one forward with those that are gone."""
    history = steps(5, 4)

    history.roll_back(7)

    assert kept(history) == [5, 2]
    assert (len(history), history.nbytes) == (7, 20)
    assert [result for _, result in history] == ["result 0", "result 1"]


def test_what_is_rolled_back_as_a_whole_is_forgotten() -> None:
    history = steps(5, 4, 3)

    history.roll_back(6)
    history.roll_back(6)
    history.add_step(b"y", 6, 2, "again")

    assert kept(history) == [5, 1, 2]
    assert [result for _, result in history] == ["result 0", "result 1", "again"]
    history.roll_back(0)
    assert (kept(history), len(history), history.nbytes) == ([], 0, 0)


def test_rows_stay_where_they_were_changed() -> None:
    history = steps(5)
    history.add_rows((0, 0, 0))
    history.add_step(b"x", 5, 1, "x")
    history.add_rows((2, 0, 1))
    history.add_step(b"y", 6, 1, "y")

    assert kept(history) == [5, (0, 0, 0), 1, (2, 0, 1), 1]
    history.roll_back(5)  # the rows that are left are those of the last change
    assert kept(history) == [5, (0, 0, 0), (2, 0, 1)]
    assert [result for _, result in history] == ["result 0", None, None]


def test_changes_of_rows_before_anything_was_sent_are_none() -> None:
    history: History[str] = History()
    history.add_rows((0, 0))

    assert kept(history) == []


def test_a_copy_goes_its_own_way() -> None:
    one = steps(5, 4)
    other = one.copy()

    one.roll_back(6)
    other.add_step(b"z", 9, 1, "z")

    assert (kept(one), kept(other)) == ([5, 1], [5, 4, 1])


def test_beyond_the_limit_nothing_is_kept() -> None:
    history = steps(5, 4, 3, limit=25)

    assert not history.complete
    assert (kept(history), history.nbytes) == ([], 0)
    history.add_step(b"x", 12, 1, "x")
    history.roll_back(6)
    assert not history.complete
    assert not history.copy().complete
    history.roll_back(0)  # an empty session has no history
    history.add_step(b"x", 0, 1, "x")
    assert (history.complete, kept(history)) == (True, [1])


# --- The policy ------------------------------------------------------------------------------


def test_pauses_grow_up_to_the_longest_and_are_drawn_from_all_below() -> None:
    policy = RetryPolicy(base=0.5, maximum=3.0)

    assert [policy.longest(n) for n in (1, 2, 3, 4, 5, 1000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert policy.pause(3, lambda low, high: low + high) == 2.0
    drawn = [policy.pause(4) for _ in range(200)]
    assert min(drawn) < 1
    assert 2 < max(drawn) <= 3


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"base": -1.0}, {"total": float("inf")}, {"attempts": "3"}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RetryPolicy(**wrong)  # type: ignore[arg-type]
