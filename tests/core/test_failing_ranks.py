"""Ranks that fail, hang and die during a load: the others end with an error that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checkpoints import Checkpoint
from failing_ranks import TIMEOUT
from ranks import Run, run_ranks

# What a busy machine may take beyond the deadline itself.
SLACK = 30


@pytest.fixture(scope="module")
def ended(
    make_checkpoint: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return what the ranks that live answered, by check."""
    folder = tmp_path_factory.mktemp("failing")
    settings = {"llama": str(make_checkpoint("llama", shard_size="40KB").path)}
    several = ["check_a_rank_that_fails", "check_a_rank_that_hangs", "check_a_rank_that_dies"]
    plan = {
        "slices": (several, 2),
        "receiver": (["check_a_receiver_that_dies"], 2),
        "reader": (["check_a_reader_that_dies"], 0),
    }
    runs = [
        Run(str(folder / name), ["failing_ranks"], 3, settings, checks, dying)
        for name, (checks, dying) in plan.items()
    ]
    run_ranks(folder, runs)
    found: dict[str, list[dict[str, Any]]] = {}
    for answers in (survivor for run in runs for survivor in run.answers()):
        for check, answer in answers.items():
            assert "error" not in answer, answer
            found.setdefault(check, []).append(answer["value"])
    return found


Ended = dict[str, list[dict[str, Any]]]


def _named(found: list[dict[str, Any]], rank: int) -> list[str]:
    """Check that all of these name a rank, in time, and return what they say."""
    for answer in found:
        assert answer["kind"] == "RankLostError"
        assert answer["ranks"] == [rank], answer["text"]
        assert f"rank {rank}" in answer["text"]
        assert answer["seconds"] < TIMEOUT + SLACK
    return [answer["text"] for answer in found]


def test_a_rank_that_fails_says_why_and_the_others_repeat_it(ended: Ended) -> None:
    first, failing, third = ended["check_a_rank_that_fails"]

    assert failing["kind"] == "OSError"
    for text in _named([first, third], 1):
        assert "loading: rank 1 failed: OSError: [Errno 5] the disk of this rank is gone" in text


def test_a_rank_that_hangs_is_given_up_after_the_deadline(ended: Ended) -> None:
    found = ended["check_a_rank_that_hangs"]

    assert len(found) == 3  # it is told so itself, when it goes on
    for text in _named(found, 2):
        assert "no sign of life for 8 s from rank 2 (last: reading" in text
    assert all(answer["seconds"] >= TIMEOUT for answer in found[:2])


def test_a_rank_that_dies_is_given_up_after_the_deadline(ended: Ended) -> None:
    found = ended["check_a_rank_that_dies"]

    assert len(found) == 2
    for text in _named(found, 2):
        assert "no sign of life for 8 s from rank 2" in text


def test_a_receiver_that_dies_is_named_by_those_that_live(ended: Ended) -> None:
    found = ended["check_a_receiver_that_dies"]

    assert len(found) == 2
    _named(found, 2)


def test_a_reader_that_dies_is_named_by_those_that_wait_for_it(ended: Ended) -> None:
    found = ended["check_a_reader_that_dies"]

    assert len(found) == 2
    for text in _named(found, 0):
        assert "the connection with rank 0 broke" in text or "no sign of life" in text
