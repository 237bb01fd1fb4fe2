"""What generating through a split costs: against the unsplit model, and over a long round trip.

The ways that are compared take turns in one process (`generate_child`), with one thread; the Trunk
is served by another, with one thread as well.  A figure is the median of its rounds' ratios.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from splitlearn_manager.bench import generate_gateway
from splitlearn_manager.bench.checkpoints import QWEN2_0_5B, QWEN2_TINY, BenchCheckpoint
from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.serve_processes import ask, started

logger = logging.getLogger(__name__)

_CHILD = "splitlearn_manager.bench.generate_child"
_MS = 1e3
_ROUND_TRIP = 0.05
_FRAME_BYTES = 128
_ITEMSIZES = {"float32": 4, "bfloat16": 2}

DEMO = "builtin:demo"
DEMO_POINTS = [2, 6]
REPEATING = "The quick list of names is returned by the function; " * 5
CANDIDATES = 10


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        checkpoint: The model.
        points: Its cuts.
        dtype: What all parts, and the unsplit model, compute in.
        prompt: Tokens of the prompt.
        new: Tokens that are made of it.
        rounds: How often.
        lookup: Tokens that are made with prompt lookup.
        promised: Whether the targets are meant for this size.
    """

    checkpoint: BenchCheckpoint
    points: tuple[int, int] = (4, 20)
    dtype: str = "float32"
    prompt: int = 128
    new: int = 24
    rounds: int = 7
    lookup: int = 96
    promised: bool = True

    def target(self, value: float) -> float | None:
        """Return a target, where the size is the one that it was promised for."""
        return value if self.promised else None

    @property
    def model(self) -> dict[str, Any]:
        """What a server, or whoever generates, is told of the model."""
        return {
            "model": str(self.checkpoint.folder),
            "points": list(self.points),
            "dtype": self.dtype,
        }

    @property
    def name(self) -> str:
        """The model, in words."""
        return f"{self.checkpoint.shape.name}, {self.dtype}, cut at {self.points}"


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make the checkpoint, and measure.

    Args:
        work_dir: Holds the checkpoint, which stays there for the next run.
        groups: Which of `ROWS`.
        quick: Whether to take a tiny model, few rounds and no targets.

    Raises:
        BenchError: A measured process failed.
    """
    scale = Scale(BenchCheckpoint(QWEN2_0_5B, 1, work_dir))
    if quick:
        tiny = BenchCheckpoint(QWEN2_TINY, 1, work_dir)
        scale = Scale(tiny, (2, 4), "float32", 8, 4, 2, 16, promised=False)
    scale.checkpoint.make()
    bench = Bench(scale)
    rows: list[Row] = []
    for group in groups:
        logger.info("measuring %s", group)
        rows += ROWS[group](bench)
    return Report.here(rows)


class Bench:
    """One run, and what several of its rows are made of.

    Attributes:
        scale: How much is measured.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    @cached_property
    def ways(self) -> dict[str, Any]:
        """What generating in every way, in turns, has shown."""
        scale = self.scale
        with served(scale.model) as url:
            return child(
                "ways",
                **scale.model,
                prompt=scale.prompt,
                new=scale.new,
                rounds=scale.rounds,
                url=url,
                round_trip=_ROUND_TRIP,
            )


def _parts(bench: Bench) -> list[Row]:
    """Return the row of parts in one process."""
    computed = 1 / _ratio(bench.ways, "parts", "unsplit", 2)
    note = f"{computed:.3f} by the CPU's time, which others' work on the machine changes less"
    return [_speed(bench, "parts", "parts in one process", 0.98, note)]


def _loopback(bench: Bench) -> list[Row]:
    """Return the rows of a Trunk in another process on this machine."""
    scale, found = bench.scale, bench.ways
    hidden = scale.checkpoint.shape.settings["hidden_size"]
    state = 2 * hidden * _ITEMSIZES[scale.dtype]
    return [
        _speed(bench, "loopback", "Trunk over loopback", 0.95),
        Row(
            f"Trunk over loopback ({scale.name}): first token, of unsplit",
            _ratio(found, "loopback", "unsplit", 1),
            "x",
            "<=",
            scale.target(1.15),
            note=f"prompt of {scale.prompt}",
        ),
        Row(
            "bytes on the wire for a token, both ways",
            found["bytes"],
            "bytes",
            "<=",
            scale.target(state + _FRAME_BYTES),
            note=f"counted at the socket; of them hidden states: {state:,}",
        ),
        *_where(found["breakdown"]),
    ]


def _delayed(bench: Bench) -> list[Row]:
    """Return the row of a Trunk behind a long round trip, without speculation."""
    scale, rounds = bench.scale, bench.ways["rounds"]
    bounds = [
        (seconds + scale.new * _ROUND_TRIP) / delayed
        for (seconds, *_), (delayed, *_) in zip(rounds["unsplit"], rounds["delayed"], strict=True)
    ]
    return [
        Row(
            f"Trunk behind {_ROUND_TRIP * _MS:.0f} ms of round trip ({scale.name}): tokens a second"
            " of 1 / (round trip + compute)",
            median(bounds),
            "x",
            ">=",
            scale.target(0.95),
            note=f"compute is what the unsplit model takes in the same round; {_rounds(scale)}",
        )
    ]


def _lookup(bench: Bench) -> list[Row]:
    """Return the rows of speculation over that round trip, with the built-in model."""
    scale = bench.scale
    model: dict[str, Any] = {"model": DEMO, "points": DEMO_POINTS, "dtype": "float32"}
    with served(model) as url:
        found = child(
            "lookup",
            **model,
            text=REPEATING,
            new=scale.lookup,
            candidates=CANDIDATES,
            url=url,
            round_trip=_ROUND_TRIP,
        )
    looked, plain = found["lookup"], found["plain"]
    note = (
        f"{looked['tokens']} tokens in {looked['round_trips']} round trips;"
        f" {'the same tokens as' if found['same'] else '**other tokens than**'} without"
    )
    return [
        Row(
            "prompt lookup, built-in model, a prompt that repeats itself: tokens a round trip",
            looked["tokens"] / looked["round_trips"],
            "tokens",
            ">=",
            scale.target(2),
            note=note,
        ),
        Row(
            f"the same behind {_ROUND_TRIP * _MS:.0f} ms of round trip: as fast as without",
            plain["seconds"] / looked["seconds"],
            "x",
            ">=",
            note=f"{looked['tokens'] / looked['seconds']:.1f} tokens a second",
        ),
    ]


def _speed(bench: Bench, way: str, name: str, target: float, more: str = "") -> Row:
    """Return the row of a way's tokens a second, against the unsplit model's."""
    scale, found = bench.scale, bench.ways
    per_second = [scale.new / seconds for seconds, *_ in found["rounds"]["unsplit"]]
    same = "the same tokens" if found["same"] else "**not the same tokens**"
    return Row(
        f"{name} ({scale.name}): tokens a second, of unsplit",
        1 / _ratio(found, way, "unsplit", 0),
        "x",
        ">=",
        scale.target(target),
        note=(
            f"prompt {scale.prompt} and {scale.new} tokens, prompt included; unsplit"
            f" {median(per_second):.2f} tokens a second; {same}; {_rounds(scale)}"
            + (f"; {more}" if more else "")
        ),
    )


def _ratio(found: dict[str, Any], one: str, other: str, which: int) -> float:
    """Return the median of the rounds' ratios: 0 all seconds, 1 to the first token, 2 of CPU."""
    rounds: dict[str, list[list[float]]] = found["rounds"]
    return median(a[which] / b[which] for a, b in zip(rounds[one], rounds[other], strict=True))


def _where(breakdown: dict[str, Any]) -> Iterator[Row]:
    """Yield where a step's time went, the prompt's included."""
    for name in ("bottom", "wire", "queue", "trunk", "top", "other"):
        seconds = breakdown[name]
        yield Row(
            f"over loopback, a step's time, the prompt's among them: {name}",
            None if seconds is None else seconds / breakdown["steps"] * _MS,
            "ms",
            "<=",
            note="" if seconds is not None else "in `wire`: the server does not say",
        )


def _rounds(scale: Scale) -> str:
    return f"median of {scale.rounds} rounds"


@contextmanager
def served(model: dict[str, Any], **server: Any) -> Iterator[str]:
    """Serve a model's Trunk from another process, and wait until it is there; yield the address."""
    with started("daemon", {**model, "server": {"log_level": "error", **server}}) as url:
        ask("ready", url=url)
        yield url


def child(task: str, *, module: str = _CHILD, **arguments: Any) -> dict[str, Any]:
    """Let a fresh process do a task, and return its figures."""
    command = [sys.executable, "-m", module, task, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        raise BenchError(f"the measured process failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "parts": _parts,
    "loopback": _loopback,
    "delayed": _delayed,
    "lookup": _lookup,
    "gateway": lambda bench: generate_gateway.rows(bench.scale),
}
"""What `--rows` can name -> what measures it."""
