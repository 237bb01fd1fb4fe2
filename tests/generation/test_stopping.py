"""Texts at which an answer ends: found across pieces, and nothing of them gets out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.generation.stopping import StopStrings

LETTERS = st.text("abc", max_size=12)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    found = StopStrings(stops)
    given_out = [found.feed(piece) for piece in pieces]
    return [*given_out, found.finish()], found.stopped


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.lists(LETTERS))
def test_the_text_up_to_the_first_of_them(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    places = [at for at in (text.find(stop) for stop in stops) if at >= 0]

    out, stopped = run(stops, pieces)

    assert stopped is bool(places)
    so_far = "".join(out)
    assert text.startswith(so_far)
    # Which of two is met first depends on how much came at once; never is one let through.
    assert not any(stop in so_far for stop in stops)
    if not places:
        assert so_far == text
    elif len(stops) == 1:
        assert so_far == text[: places[0]]


def test_a_text_across_pieces() -> None:
    assert run(["\n\nQ:"], ["yes\n", "\n", "Q", ": no"]) == (["yes", "", "", "", ""], True)


def test_what_only_began_like_one_comes_when_more_has_come() -> None:
    assert run(["END"], ["E", "N", "x", "EN"]) == (["", "", "ENx", "", "EN"], False)


def test_without_texts_everything_passes() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], False)
