"""`docs/states.md` is what `scripts/draw_states` makes of the table."""

from __future__ import annotations

import runpy
from pathlib import Path

from splitlearn_manager.core.states import ABSENT, TRANSITIONS, LoadPhase, ModelStatus, state_name

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    draw = runpy.run_path(str(ROOT / "scripts" / "draw_states.py"))["draw"]

    assert (ROOT / "docs" / "states.md").read_text() == draw(), "run scripts/draw_states"


def test_it_has_every_move_and_every_state() -> None:
    page = (ROOT / "docs" / "states.md").read_text()

    drawn = [line.strip() for line in page.splitlines() if "-->" in line]
    names = {state: "[*]" if state is ABSENT else state_name(state) for state in TRANSITIONS}
    moves = {f"{names[old]} --> {names[new]}" for old in TRANSITIONS for new in TRANSITIONS[old]}
    assert set(drawn) == moves
    for value in (*ModelStatus, *LoadPhase):
        assert f"| `{value.value}` | " in page
