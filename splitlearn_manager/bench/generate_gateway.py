"""Requests at a gateway at home: Bottom and Top there, batched, the Trunk in another daemon.

Both daemons and the clients are processes of their own; each daemon computes with one thread, and
they take turns, so that there is work for one core.  What they are compared with is transformers'
`generate` of the unsplit model with a static batch of the same prompts, in a process of its own
with one thread: it has them all at once, and nothing to send.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.report import Row
from splitlearn_manager.bench.serve import PACKED, Kind
from splitlearn_manager.bench.serve_processes import ask, started

if TYPE_CHECKING:
    from splitlearn_manager.bench.generate import Scale

logger = logging.getLogger(__name__)

_CHILD = "splitlearn_manager.bench.generate_gateway_child"
_STOP_SECONDS = 60

AS_IT_IS = Kind("bfloat16")
TARGETS = {AS_IT_IS: 0.85, Kind("bfloat16", "prepacked"): 1.15, Kind("bfloat16", "int8"): 2.2}
"""How the parts are kept -> how many times as fast as the static batch they should be."""

KINDS = (AS_IT_IS, *PACKED)
QUICK_KINDS = (AS_IT_IS,)


@dataclass(frozen=True)
class Load:
    """How much is asked of the gateway.

    Attributes:
        requests: Requests, which come at once.
        new: Tokens of each answer.
        rounds: How often.
    """

    requests: int = 8
    new: int = 64
    rounds: int = 3


def rows(scale: Scale) -> list[Row]:
    """Return the rows of requests at a gateway."""
    load = Load() if scale.promised else Load(requests=3, new=4, rounds=1)
    _child("tokenizer", model=str(scale.checkpoint.folder))
    kinds = KINDS if scale.promised else QUICK_KINDS
    ratios: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    alone = []
    for number in range(load.rounds):
        alone.append(_static(scale, load))
        for kind in kinds:
            ratios[kind].append(alone[-1] / _gateway(scale, load, kind))
            logger.info("%s, round %d: %.2f", kind, number + 1, ratios[kind][-1])
    return [_row(scale, load, kind, ratios[kind], alone) for kind in kinds]


def _row(
    scale: Scale, load: Load, kind: Kind, ratios: Sequence[float], alone: Sequence[float]
) -> Row:
    target = TARGETS.get(kind)
    per_second = load.requests * load.new / median(alone)
    return Row(
        f"{load.requests} requests at a home gateway ({scale.checkpoint.shape.name}, cut at"
        f" {scale.points}, {kind}): tokens a second, of `generate` with a static batch"
        f" of {load.requests} in {AS_IT_IS}",
        median(ratios),
        "x",
        ">=",
        None if target is None else scale.target(target),
        note=(
            f"prompt {scale.prompt} and {load.new} tokens each, prompts included; the static batch"
            f" gives {per_second:.1f} tokens a second; median of {load.rounds} rounds, of"
            f" {', '.join(f'{ratio:.2f}' for ratio in ratios)}"
        ),
    )


def _static(scale: Scale, load: Load) -> float:
    """Return the seconds of the static batch."""
    found = _child(
        "static",
        model=str(scale.checkpoint.folder),
        dtype=AS_IT_IS.dtype,
        batch=load.requests,
        prompt=scale.prompt,
        new=load.new,
    )
    return float(found["seconds"])


def _gateway(scale: Scale, load: Load, kind: Kind) -> float:
    """Return the seconds until a gateway has answered every request."""
    model = {**scale.model, "dtype": kind.dtype, "quantization": kind.quantization}
    with started("daemon", {**model, "server": {"log_level": "error"}}) as trunk:
        ask("ready", url=trunk)
        with _served({**model, "trunk": trunk}) as url:
            found = _child(
                "requests",
                url=url,
                requests=load.requests,
                prompt=scale.prompt,
                new=load.new,
                vocabulary=scale.checkpoint.shape.settings["vocab_size"],
            )
    return float(found["seconds"])


@contextmanager
def _served(arguments: dict[str, Any]) -> Iterator[str]:
    """Run the gateway, and yield its address when it is ready."""
    with subprocess.Popen(  # noqa: S603 - this very Python, and a module of our own
        [sys.executable, "-m", _CHILD, "gateway", json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline().strip() if process.stdout is not None else ""
            if not line:
                raise BenchError("the gateway ended before it said where it is")
            yield line
            if process.stdin is not None:
                process.stdin.close()
            process.wait(_STOP_SECONDS)
        finally:
            process.kill()


def _child(task: str, **arguments: Any) -> dict[str, Any]:
    """Let a fresh process do a task, and return its figures."""
    from splitlearn_manager.bench.generate import child  # noqa: PLC0415 - it imports this module

    return child(task, module=_CHILD, **arguments)
