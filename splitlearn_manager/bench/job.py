"""What a measured process is told to do: plain values that cross as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Way = Literal["part", "parts", "traditional", "transformers", "accelerate", "plan"]
Step = Literal["load", "touch", "forward"]


@dataclass(frozen=True)
class Job:
    """One way to load a model, and what to do with it then.

    Attributes:
        way: Who loads what: `part` one component, `parts` all of them from the open checkpoint,
            `traditional` all of them from the whole model, `transformers` and `accelerate` the
            whole model themselves; `plan` loads nothing.
        model: Folder, or name on a hub.
        split_points: Layer numbers of the cuts.
        warm_up: A small checkpoint of the same architecture, loaded the same way beforehand, so
            that imports and one-time work are not measured.
        warm_up_points: Its cuts.
        steps: What is done and measured, in order; `touch` reads from every page of the weights.
        component: Which part, where one is loaded.
        dtype: What weights are cast to; `None` keeps what is stored.
        mmap: Whether weights may stay mapped.
        cache_dir: Where files from a hub go.
    """

    way: Way
    model: str
    split_points: tuple[int, ...]
    warm_up: str
    warm_up_points: tuple[int, ...]
    steps: tuple[Step, ...] = ("load", "forward")
    component: str = "trunk"
    dtype: str | None = None
    mmap: bool = True
    cache_dir: str | None = None

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        """Read what `to_json` returned."""
        return cls(**json.loads(line))
