"""Which prompts have a piece in a round."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from splitlearn_manager.generation.turns import take_pieces


@dataclass(eq=False)
class Waits:
    length: int
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.left or self.length


def rounds(prompts: list[Waits], room: int, most: int) -> list[list[tuple[int, int]]]:
    """Return, for each round, which prompts had a piece, and how long it was."""
    waiting = deque(prompts)
    found = []
    while waiting:
        taken = []
        for prompt, piece in list(take_pieces(waiting, room, lambda _: most)):
            prompt.left -= piece
            taken.append((prompts.index(prompt), piece))
        found.append(taken)
    return found


def test_short_prompts_share_a_round() -> None:
    assert rounds([Waits(4), Waits(4), Waits(4)], room=8, most=8) == [[(0, 4), (1, 4)], [(2, 4)]]


def test_a_long_prompt_comes_in_pieces_and_lets_short_ones_between() -> None:
    assert rounds([Waits(20), Waits(3), Waits(5)], room=8, most=8) == [
        [(0, 8)],
        [(1, 3), (2, 5)],
        [(0, 8)],
        [(0, 4)],
    ]


def test_a_prompt_that_can_not_be_cut_has_a_round_of_its_own() -> None:
    assert rounds([Waits(20), Waits(3)], room=8, most=100) == [[(0, 20)], [(1, 3)]]


def test_there_is_always_one_piece() -> None:
    assert rounds([Waits(5)], room=0, most=2) == [[(0, 2)], [(0, 2)], [(0, 1)]]


def test_what_can_be_cut_fills_a_round() -> None:
    waiting = deque([Waits(5), Waits(20), Waits(3)])
    found = list(take_pieces(waiting, 8, lambda prompt: prompt.left, cut=True))
    assert [(prompt.length, piece) for prompt, piece in found] == [(5, 5), (20, 3)]
    assert [prompt.length for prompt in waiting] == [3, 20]


def test_what_can_be_cut_has_a_position_where_there_is_no_room() -> None:
    waiting = deque([Waits(5), Waits(3)])
    assert [piece for _, piece in take_pieces(waiting, 0, lambda _: 5, cut=True)] == [1]
