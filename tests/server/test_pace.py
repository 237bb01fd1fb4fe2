from __future__ import annotations

import pytest

from splitlearn_manager.serving.pace import (
    COMPANY_SHARE,
    LONG_SHARE,
    LONGEST_COMPANY_WAIT,
    LONGEST_STRAGGLERS_WAIT,
    LONGEST_WAIT,
    PACKED_LONG_SHARE,
    PACKED_SHORT_SHARE,
    RECENT,
    SHORT_SHARE,
    SHORTEST_PIECE,
    STRAGGLERS_SHARE,
    WAITING_SHARE,
    Pace,
)

CHUNK = 512
NOW = 100.0


def pace(stepping: int, seconds: float = 0.3, per_position: float = 0.005) -> Pace:
    """Return the pace of a model that so many step, and that ran a prompt's piece before."""
    found = Pace(CHUNK)
    found.piece_ran(100, 100 * per_position)
    found.steps_ran(frozenset(range(stepping)), seconds, ended=NOW)
    return found


def test_a_prompt_beside_steps_takes_a_share_of_their_time() -> None:
    assert pace(8).piece(8192, 8192, 1, 0, NOW) == int(LONG_SHARE * 0.3 / 0.005)


def test_a_forward_that_was_held_up_makes_no_piece_longer() -> None:
    found = pace(8)
    found.steps_ran(frozenset(range(8)), 3.0, NOW)
    assert found.piece(8192, 8192, 1, 0, NOW) == int(LONG_SHARE * 0.3 / 0.005)

    for _ in range(3):
        found.steps_ran(frozenset(range(8)), 0.6, NOW)
    assert found.piece(8192, 8192, 1, 0, NOW) == int(LONG_SHARE * 0.6 / 0.005)


def test_the_rows_of_a_prompt_share_the_time() -> None:
    assert pace(8).piece(8192, 8192, 3, 0, NOW) == int(LONG_SHARE * 0.3 / 0.005 / 3)


def test_a_piece_is_never_too_short_to_pay() -> None:
    assert pace(8, seconds=0.001).piece(8192, 8192, 1, 0, NOW) == SHORTEST_PIECE


def test_a_piece_is_no_longer_than_what_is_left_or_a_chunk() -> None:
    assert pace(8).piece(8192, 7, 1, 0, NOW) == 7
    assert pace(8, seconds=60).piece(8192, 8192, 1, 0, NOW) == CHUNK


def test_with_nobody_beside_it_a_prompt_runs_in_chunks() -> None:
    assert Pace(CHUNK).piece(8192, 8192, 1, 0, NOW) == CHUNK
    assert pace(8).piece(8192, 8192, 1, 0, NOW + RECENT + 0.1) == CHUNK


def test_steps_that_take_long_are_remembered_for_longer() -> None:
    slow = pace(8, seconds=2, per_position=0.1)
    assert slow.piece(8192, 8192, 1, 0, NOW + 2 * RECENT - 0.1) == int(LONG_SHARE * 2 / 0.1)
    assert slow.piece(8192, 8192, 1, 0, NOW + 2 * RECENT + 0.1) == CHUNK


def test_the_first_piece_of_a_model_is_a_chunk() -> None:
    fresh = Pace(CHUNK)
    fresh.steps_ran(frozenset({1}), 0.3, ended=NOW)
    assert fresh.piece(128, 128, 1, 1, NOW) == 128


def test_a_prompt_of_a_chunk_is_soon_done() -> None:
    assert pace(8).piece(300, 300, 1, 1, NOW) == int(SHORT_SHARE * 0.3 / 0.005)


def test_the_end_of_a_long_prompt_is_that_of_a_long_prompt() -> None:
    assert pace(8).piece(8192, 300, 1, 0, NOW) == int(LONG_SHARE * 0.3 / 0.005)


def test_short_prompts_that_wait_together_run_whole() -> None:
    assert pace(8).piece(300, 300, 1, 2, NOW) == 300


def test_a_long_prompt_does_not_come_first_however_many_wait() -> None:
    assert pace(1).piece(CHUNK + 1, CHUNK + 1, 1, 9, NOW) == int(LONG_SHARE * 0.3 / 0.005)


def test_those_of_the_last_two_forwards_are_expected() -> None:
    found = pace(2)
    found.steps_ran(frozenset({1, 7}), 0.3, NOW)
    assert found.expected() == 3
    found.steps_ran(frozenset({7}), 0.3, NOW)
    assert found.expected() == 2


def test_patience_is_a_share_of_a_forward() -> None:
    assert round(pace(1, seconds=0.01).patience(NOW), 9) == 0.01 * WAITING_SHARE
    assert round(pace(1, seconds=60).patience(NOW), 9) == LONGEST_WAIT
    assert pace(1, seconds=0.01).patience(NOW + 1) == 0.01 * STRAGGLERS_SHARE
    assert pace(1).patience(NOW + 1) == LONGEST_STRAGGLERS_WAIT
    assert pace(1).patience(NOW + RECENT + 0.1) == 0
    assert Pace(CHUNK).patience(NOW) == 0


def test_those_whose_prompts_ended_are_expected_until_steps_have_run() -> None:
    found = Pace(CHUNK)
    found.prompts_ended(frozenset({1, 2}), 0.3, NOW)
    found.prompts_ended(frozenset({3}), 0.3, NOW)
    found.prompts_ended(frozenset(), 9, NOW + 9)
    assert (found.expected(), found.expected(newcomers=False)) == (3, 0)

    found.steps_ran(frozenset({1, 8}), 0.3, NOW)
    assert found.expected() == 2
    found.prompts_ended(frozenset({8, 9}), 0.3, NOW)
    assert (found.expected(), found.expected(newcomers=False)) == (3, 2)
    found.forget(8)
    assert found.expected() == 2
    found.begin_anew()
    assert found.expected() == 0


def test_patience_with_those_whose_prompts_ended_is_a_share_of_what_these_took() -> None:
    found = Pace(CHUNK)
    found.prompts_ended(frozenset({1}), 0.01, NOW)
    assert round(found.patience(NOW), 9) == 0.01 * WAITING_SHARE
    assert found.patience(NOW + 1) == 0.01 * STRAGGLERS_SHARE
    assert found.patience(NOW + RECENT + 0.1) == 0


def test_what_is_packed_beside_steps_takes_a_share_of_their_time() -> None:
    assert pace(8).room(NOW, short=False, beside=True) == int(PACKED_LONG_SHARE * 0.3 / 0.005)
    assert pace(8).room(NOW, short=True, beside=True) == int(PACKED_SHORT_SHARE * 0.3 / 0.005)
    assert pace(8, seconds=0.001).room(NOW, short=True, beside=True) == SHORTEST_PIECE
    assert pace(8, seconds=60).room(NOW, short=True, beside=True) == CHUNK


def test_without_steps_a_packed_forward_has_room_for_a_chunk() -> None:
    assert Pace(CHUNK).room(NOW, short=False, beside=False) == CHUNK
    late = NOW + RECENT + 0.1
    assert pace(8).room(late, short=False, beside=False) == CHUNK
    assert pace(8).room(late, short=False, beside=True) < CHUNK
    assert pace(8).room(NOW, short=False, beside=False) < CHUNK


def test_what_steps_take_is_known_from_forwards_of_steps_alone() -> None:
    found = Pace(CHUNK)
    assert not found.knows_steps
    found.packed_ran(frozenset(), 100, 0.5, NOW)
    assert not found.knows_steps
    assert found.per_position == 0.005
    found.packed_ran(frozenset({1}), 0, 0.3, NOW)
    assert found.knows_steps
    found.packed_ran(frozenset({1, 2}), 50, 0.3 + 0.1, NOW + 1)
    assert (found.expected(), found.ended) == (2, NOW + 1)
    assert found.per_position == 0.005  # the dearest of the last four
    for _ in range(3):
        found.packed_ran(frozenset({1, 2}), 50, 0.3 + 0.1, NOW + 1)
    assert round(found.per_position, 9) == 0.1 / 50
    assert found.room(NOW + 1, short=False, beside=True) in {179, 180}


@pytest.mark.parametrize(("before", "now"), [(0.01, 0.1), (0.1, 0.01)])
def test_steps_that_come_to_take_longer_or_less_are_found_out(before: float, now: float) -> None:
    """While prompts never stop, a forward of steps alone comes between from time to time."""
    found = pace(2, seconds=before, per_position=0.001)
    both = frozenset({1, 2})
    rooms = []
    for turn in range(60):
        if not found.knows_steps:
            found.packed_ran(both, 0, now, NOW + turn)
        room = found.room(NOW + turn, short=False, beside=True)
        found.packed_ran(both, room, now + 0.001 * room, NOW + turn)
        rooms.append(room)

    fair = PACKED_LONG_SHARE * now / 0.001
    assert all(0.9 * fair <= room <= 1.1 * fair for room in rooms[30:])


def test_a_forward_of_nobody_tells_nothing() -> None:
    found = Pace(CHUNK)
    found.packed_ran(frozenset(), 0, 0.001, NOW)
    assert found == Pace(CHUNK)


def test_pieces_that_seem_to_take_no_time_take_a_tenth_of_their_forward() -> None:
    found = pace(1)
    found.packed_ran(frozenset({1}), 50, 0.2, NOW)
    assert round(found.per_position, 9) == 0.02 / 50


def test_what_is_known_of_a_model_outlives_its_sessions() -> None:
    found = pace(8)
    found.begin_anew()
    assert found.expected() == 0
    assert found.room(NOW, short=True, beside=False) == CHUNK
    assert found.room(NOW, short=True, beside=True) == int(PACKED_SHORT_SHARE * 0.3 / 0.005)


def test_a_few_positions_alone_tell_nothing_of_what_more_would_take() -> None:
    found = Pace(CHUNK)
    found.packed_ran(frozenset(), 8, 0.3, NOW)
    assert found.per_position == 0
    found.packed_ran(frozenset({1}), 0, 0.3, NOW)
    found.packed_ran(frozenset(), 8, 0.34, NOW)
    assert round(found.per_position, 9) == 0.005


def test_a_prompt_waits_for_company_for_a_share_of_what_it_takes() -> None:
    assert round(pace(1).company(10), 9) == 10 * 0.005 * COMPANY_SHARE
    assert pace(1).company(5000) == LONGEST_COMPANY_WAIT
    assert Pace(CHUNK).company(10) == LONGEST_COMPANY_WAIT
    short = Pace(CHUNK)
    short.packed_ran(frozenset(), 8, 0.02, NOW)  # too short to tell what prompts take
    assert short.per_position == 0
    assert round(short.company(10), 9) == 10 * 0.0025 * COMPANY_SHARE
