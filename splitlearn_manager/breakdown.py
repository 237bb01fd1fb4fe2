"""Where the time of a token goes: Bottom, wire, queue, Trunk, Top, and the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from torch import nn

if TYPE_CHECKING:
    from splitlearn_core import SplitCausalLM
    from splitlearn_manager.client import Timings

_MS = 1e3


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one generation, by what they went for.

    Attributes:
        seconds: All of them.
        steps: Forwards through the chain; the prompt's is one.
        bottom: Bottom's forwards.
        trunk: The Trunks' forwards, here or, as the servers say, there.
        top: Top's forwards.
        queue: Waiting at the servers for others' forwards to end.
        wire: What else went by until the servers' answers were here: the network, and both sides'
            handling of it.  Where a server does not say how long its forwards took, they are in
            it as well, and `queue` and `trunk` are `None`: `RemoteTrunk(…, timings=True)` asks.
        other: Everything else: choosing the next token, masks, text.
        round_trips: Questions to each server.
    """

    seconds: float
    steps: int
    bottom: float
    wire: float
    queue: float | None
    trunk: float | None
    top: float
    other: float
    round_trips: int

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, in seconds, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def describe(self) -> str:
        """Return a table for people: milliseconds a step, and shares."""
        rows = [
            ("Bottom", self.bottom),
            ("wire", self.wire),
            ("queue", self.queue),
            ("Trunk", self.trunk),
            ("Top", self.top),
            ("other", self.other),
        ]
        steps = max(self.steps, 1)
        lines = [f"where a step's {self.seconds / steps * _MS:.1f} ms went ({self.steps} steps):"]
        for name, seconds in rows:
            if seconds is None:
                lines.append(f"  {name:<7} in wire: the server does not say")
            else:
                share = seconds / self.seconds if self.seconds else 0.0
                lines.append(f"  {name:<7} {seconds / steps * _MS:8.1f} ms  {share:6.1%}")
        return "\n".join(lines)


class Stopwatch:
    """Times a model's parts for as long as a `with` block lasts.

        with Stopwatch(model) as watch:
            model.generate(...)
        print(watch.breakdown().describe())

    The prompt's step is in it, as are all steps of speculation.

    Args:
        model: Whose parts are timed.
    """

    def __init__(self, model: SplitCausalLM) -> None:
        self._model = model
        self._spent: dict[int, float] = {id(part): 0.0 for part in model.parts}
        self._calls: dict[int, int] = dict.fromkeys(self._spent, 0)
        self._remote = [part for part in model.parts if not isinstance(part, nn.Module)]
        self._before: list[Timings] = []
        self._after: list[Timings] = []
        self._start = self._end = 0.0

    def __enter__(self) -> Self:
        """Begin."""
        self._before = [part.timings for part in self._remote]
        self._model.observer = self._note
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave off."""
        self._end = time.perf_counter()
        self._model.observer = None
        self._after = [part.timings for part in self._remote]

    def _note(self, part: Any, seconds: float) -> None:
        self._spent[id(part)] += seconds
        self._calls[id(part)] += 1

    @property
    def steps(self) -> int:
        """Forwards through the chain so far."""
        return self._calls[id(self._model.bottom)]

    @property
    def round_trips(self) -> int:
        """Questions to each server so far; 0 where every part is here."""
        return max((self._calls[id(part)] for part in self._remote), default=0)

    def breakdown(self) -> Breakdown:
        """Return where the time of the block went."""
        seconds = self._end - self._start
        spent = self._spent
        bottom, top = spent[id(self._model.bottom)], spent[id(self._model.top)]
        away = sum(spent[id(part)] for part in self._remote)
        here = sum(spent.values()) - bottom - top - away
        queue, forwards = self._of_servers()
        wire = away if queue is None or forwards is None else away - queue - forwards
        trunk = None if forwards is None and self._remote else here + (forwards or 0.0)
        return Breakdown(
            seconds=seconds,
            steps=self.steps,
            bottom=bottom,
            wire=max(0.0, wire),
            queue=queue if self._remote else 0.0,
            trunk=trunk,
            top=top,
            other=max(0.0, seconds - sum(spent.values())),
            round_trips=self.round_trips,
        )

    def _of_servers(self) -> tuple[float | None, float | None]:
        """Return the seconds of waiting and of forwards that the servers told of in the block."""
        pairs = list(zip(self._before, self._after, strict=True))
        queue = sum(after.queue_seconds - before.queue_seconds for before, after in pairs)
        forwards = [after.forward_seconds - before.forward_seconds for before, after in pairs]
        return (queue, sum(forwards)) if forwards and all(forwards) else (None, None)
