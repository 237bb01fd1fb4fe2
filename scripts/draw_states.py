"""Draw the life of a model from the manager's table of states, as a diagram that GitHub shows."""

from __future__ import annotations

import inspect
import re
from enum import StrEnum
from pathlib import Path

from splitlearn_manager.core import states

TARGET = Path(__file__).resolve().parent.parent / "docs" / "states.md"

_DOCSTRING = re.compile(r'^\s+([A-Z_]+) = "(\w+)"\n\s+"""(.*?)"""', re.MULTILINE | re.DOTALL)


def draw() -> str:
    """Return the page."""
    return "\n".join(
        [
            "# The life of a model",
            "",
            "Drawn by `scripts/draw_states` from the table in `splitlearn_manager/core/states.py`.",
            "The manager makes no other move.",
            "",
            "```mermaid",
            "stateDiagram-v2",
            *(f"    {_node(old)} --> {_node(new)}" for old, new in _moves()),
            "```",
            "",
            "| state | meaning |",
            "|---|---|",
            "| `absent` | The manager does not have it. |",
            *_rows(states.ModelStatus),
            "",
            "| phase of `loading` | meaning |",
            "|---|---|",
            *_rows(states.LoadPhase),
            "",
        ]
    )


def _moves() -> list[tuple[states.State, states.State]]:
    """Return every move, in the order of the table."""
    order = [*states.TRANSITIONS]
    return [
        (old, new)
        for old, allowed in states.TRANSITIONS.items()
        for new in sorted(allowed, key=order.index)
    ]


def _node(state: states.State) -> str:
    """Return a state's name in the diagram; what is absent is its begin and end."""
    return "[*]" if state is states.ABSENT else states.state_name(state)


def _rows(kind: type[StrEnum]) -> list[str]:
    """Return a line of the table for each value, with its docstring."""
    found = _DOCSTRING.findall(inspect.getsource(kind))
    told = {name: " ".join(text.split()) for name, _, text in found}
    return [f"| `{value.value}` | {told[value.name]} |" for value in kind]


def main() -> None:
    """Write the page."""
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(draw(), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
