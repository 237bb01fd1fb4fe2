"""Where a model is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from splitlearn_core.plan import ComponentSpec, SplitPlan


def test_two_points_make_bottom_trunk_top() -> None:
    plan = SplitPlan.from_split_points(28, [8, 24])

    assert plan.components == (
        ComponentSpec("bottom", 0, 8, True, False),
        ComponentSpec("trunk", 8, 24, False, False),
        ComponentSpec("top", 24, 28, False, True),
    )


def test_more_points_make_numbered_trunks() -> None:
    plan = SplitPlan.from_split_points(12, [2, 5, 10])

    assert plan.names == ("bottom", "trunk-0", "trunk-1", "top")
    assert [spec.num_layers for spec in plan.components] == [2, 3, 5, 2]


def test_full_is_always_there() -> None:
    spec = SplitPlan.from_split_points(12, [2, 10]).component("full")

    assert spec == ComponentSpec("full", 0, 12, True, True)


@pytest.mark.parametrize("points", [[10, 2], [2, 2], [0, 4], [2, 12], [-1, 4], [2], [], [2, 13]])
def test_bad_points_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="split points"):
        SplitPlan.from_split_points(12, points)


def test_out_of_range_says_how_many_layers() -> None:
    with pytest.raises(ValueError, match="12 layers, so each must be from 1 to 11"):
        SplitPlan.from_split_points(12, [2, 20])


@pytest.mark.parametrize(
    "points",
    [
        ["2", 4],
        [True, 4],
        [2.0, 4],
        [np.float32(2), 4],
        [np.bool_(True), 4],
        torch.tensor([False, True]),
        torch.tensor([2.0, 4.0]),
    ],
    ids=str,
)
def test_points_that_are_no_integers(points: list[object]) -> None:
    with pytest.raises(ValueError, match="must be layer numbers"):
        SplitPlan.from_split_points(12, points)  # type: ignore[arg-type]


@pytest.mark.parametrize("points", [np.array([2, 4]), [np.int64(2), 4], torch.tensor([2, 4])])
def test_whole_numbers_of_any_kind_become_pythons(points: Any) -> None:
    plan = SplitPlan.from_split_points(12, points)

    assert plan == SplitPlan.from_split_points(12, [2, 4])
    assert {type(spec.start_layer) for spec in plan.components} == {int}


@pytest.mark.parametrize("points", [4, np.array(4), torch.tensor(4)])
def test_one_number_is_no_list_of_points(points: Any) -> None:
    with pytest.raises(ValueError, match="must be a list"):
        SplitPlan.from_split_points(12, points)


def test_allow_empty_admits_the_ends() -> None:
    plan = SplitPlan.from_split_points(12, [0, 12], allow_empty=True)

    assert [spec.num_layers for spec in plan.components] == [0, 12, 0]


def test_unknown_component_lists_the_known() -> None:
    with pytest.raises(KeyError, match="bottom, trunk, top, full"):
        SplitPlan.from_split_points(12, [2, 10]).component("middle")
