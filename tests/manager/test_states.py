from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from splitlearn_manager.core.states import (
    ABSENT,
    TRANSITIONS,
    LoadPhase,
    ModelStatus,
    State,
    state_name,
    transition,
)
from splitlearn_manager.errors import IllegalTransitionError

LOADING, READY, UNLOADING, FAILED = ModelStatus
STATES: tuple[State, ...] = (ABSENT, *ModelStatus)
LEGAL = {
    (ABSENT, LOADING),
    (LOADING, READY),
    (LOADING, FAILED),
    (READY, UNLOADING),
    (READY, READY),
    (UNLOADING, ABSENT),
    (FAILED, LOADING),
    (FAILED, ABSENT),
}


@pytest.mark.parametrize(("old", "new"), sorted(LEGAL, key=str))
def test_a_legal_move_gives_the_new_state(old: State, new: State) -> None:
    assert transition(old, new) is new


@pytest.mark.parametrize(
    ("old", "new"), sorted(set(product(STATES, STATES)) - LEGAL, key=str), ids=str
)
def test_an_illegal_move_raises_and_changes_nothing(old: State, new: State) -> None:
    before = dict(TRANSITIONS)

    with pytest.raises(IllegalTransitionError) as caught:
        transition(old, new)

    assert f"from {state_name(old)} to {state_name(new)}, only to " in str(caught.value)
    assert dict(TRANSITIONS) == before


def test_the_table_has_each_state_once_and_can_not_be_changed() -> None:
    assert set(TRANSITIONS) == set(STATES)
    with pytest.raises(TypeError):
        TRANSITIONS[ABSENT] = frozenset()  # type: ignore[index]


def test_every_state_can_be_reached_and_left_for_absent() -> None:
    def reachable(start: State) -> set[State]:
        found = {start}
        while new := {state for old in found for state in TRANSITIONS[old]} - found:
            found |= new
        return found

    assert all(reachable(state) == set(STATES) for state in STATES)


def test_names_are_those_that_users_see() -> None:
    assert [state_name(state) for state in STATES] == [
        "absent",
        "loading",
        "ready",
        "unloading",
        "failed",
    ]
    assert [phase.value for phase in LoadPhase] == [
        "queued",
        "waiting_for_memory",
        "downloading",
        "reading",
        "warming_up",
    ]


def test_the_table_imports_neither_asyncio_nor_torch() -> None:
    program = (
        "import sys, splitlearn_manager.core.states;"
        "sys.exit('asyncio' in sys.modules or 'torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
