"""What serving a Trunk costs: against the same part in one process, and against bare streams.

Server, clients and reference are processes of their own; the server and the reference compute with
one thread.  Each round measures what is compared one after the other, and a figure is the median of
its rounds' ratios.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from splitlearn_manager.bench.checkpoints import QWEN2_0_5B, QWEN2_TINY, BenchCheckpoint
from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.serve_client import percentile

logger = logging.getLogger(__name__)

_SERVER = "splitlearn_manager.bench.serve_server"
_CLIENT = "splitlearn_manager.bench.serve_client"
_MS = 1e3
_KB = 1e3
_STOP_SECONDS = 60
_ECHO_WIDTH = 3584
_SMALL_ECHO, _LARGE_ECHO = 1, 512


@dataclass(frozen=True)
class _Scale:
    """How much is measured.

    Attributes:
        checkpoint: The model.
        points: The Trunk's cuts.
        prompt: Positions of a prompt.
        new: Positions that follow, one by one.
        rounds: How often.
        long_prompt: Positions of the prompt that comes while others step.
        usual: Steps of each before it comes.
        echoes: Steps without a model, small and large.
        idle: Sessions that do nothing.
        cycles: Sessions that are opened and closed.
        promised: Whether the targets are meant for this size.
    """

    checkpoint: BenchCheckpoint
    points: tuple[int, int] = (4, 20)
    prompt: int = 128
    new: int = 64
    rounds: int = 3
    long_prompt: int = 8192
    usual: int = 20
    echoes: tuple[int, int] = (2000, 60)
    idle: int = 2000
    cycles: int = 10_000
    promised: bool = True

    def target(self, value: float) -> float | None:
        """Return a target, where the size is the one that it was promised for."""
        return value if self.promised else None

    @property
    def hidden(self) -> list[Any]:
        """Width and dtype of the hidden states."""
        return [self.checkpoint.shape.settings["hidden_size"], "bfloat16"]

    @property
    def model(self) -> dict[str, Any]:
        """What a server, or the reference, is told of the model."""
        return {"model": str(self.checkpoint.folder), "points": list(self.points)}

    @property
    def trunk(self) -> str:
        """The part, in words."""
        return f"Trunk [{self.points[0]}, {self.points[1]}) of {self.checkpoint.shape.name}, bf16"


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make the checkpoint, and measure.

    Args:
        work_dir: Holds the checkpoint, which stays there for the next run.
        groups: Which of `ROWS`.
        quick: Whether to take small numbers and no targets.

    Raises:
        BenchError: A measured process failed.
    """
    scale = _Scale(BenchCheckpoint(QWEN2_0_5B, 1, work_dir))
    if quick:
        tiny = BenchCheckpoint(QWEN2_TINY, 1, work_dir)
        scale = _Scale(tiny, (2, 4), 8, 4, 1, 64, 2, (20, 2), 40, 40, promised=False)
    scale.checkpoint.make()
    rows: list[Row] = []
    for group in groups:
        logger.info("measuring %s", group)
        rows += ROWS[group](scale)
    return Report.here(rows)


def _streams(scale: _Scale) -> list[Row]:
    """Return the rows of 8 clients and of 1, against a static batch in one process."""
    return [_against_static(scale, sessions, target) for sessions, target in ((8, 0.9), (1, 0.95))]


def _against_static(scale: _Scale, sessions: int, target: float) -> Row:
    """Return how many positions come in a second, as a share of what the part alone gives."""
    work = {"prompt": scale.prompt, "new": scale.new}
    ratios, rates = [], []
    for number in range(scale.rounds):
        alone = _task("static", {**scale.model, "batch": sessions, **work})["seconds"]
        with _daemon(scale, sessions) as url:
            served = _ask("streams", url=url, hidden=scale.hidden, sessions=sessions, **work)
        ratios.append(alone / served["seconds"])
        rates.append(sessions * scale.new / alone)
        logger.info("%d sessions, round %d: %.2f of static", sessions, number + 1, ratios[-1])
    return Row(
        f"{scale.trunk}, {sessions} clients: positions a second, of a static batch",
        median(ratios),
        "x",
        ">=",
        scale.target(target),
        note=(
            f"prompt {scale.prompt}, {scale.new} new positions each, prompts included; the static"
            f" batch gives {median(rates):.1f} positions a second; median of {scale.rounds} rounds"
        ),
    )


def _many(scale: _Scale) -> list[Row]:
    """Return the rows of many sessions against few."""
    gains, tails = [], []
    work = {"prompt": scale.prompt, "new": scale.new}
    for _ in range(scale.rounds):
        rates = {}
        for sessions in (8, 32):
            with _daemon(scale, sessions) as url:
                served = _ask("streams", url=url, hidden=scale.hidden, sessions=sessions, **work)
            rates[sessions] = sessions / served["seconds"]
        gains.append(rates[32] / rates[8])
        tails.append(percentile(served["steps"], 99) / percentile(served["steps"], 50))
    return [
        Row("32 sessions against 8: throughput", median(gains), "x", ">=", scale.target(1.8)),
        Row("32 sessions: p99 of a step over p50", median(tails), "x", "<=", scale.target(4)),
    ]


def _prompt(scale: _Scale) -> list[Row]:
    """Return the row of steps while a long prompt comes."""
    with _daemon(scale, 9) as url:
        served = _ask(
            "beside",
            url=url,
            hidden=scale.hidden,
            sessions=8,
            prompt=scale.prompt,
            long_prompt=scale.long_prompt,
            usual=scale.usual,
        )
    usual = percentile(served["usual"], 50)
    return [
        Row(
            f"p99 of 8 clients' steps while a prompt of {scale.long_prompt:,} comes, over their"
            " usual p50",
            percentile(served["during"], 99) / usual,
            "x",
            "<=",
            scale.target(3),
            note=(
                f"usual p50 {usual * _MS:.0f} ms; {len(served['during'])} steps came meanwhile;"
                f" the prompt took {served['prompt_seconds']:.0f} s"
            ),
        )
    ]


def _echo(scale: _Scale) -> list[Row]:
    """Return the rows of a step without a model, against a bare stream."""
    hidden = [_ECHO_WIDTH, "bfloat16"]
    with (
        _started("raw", {}) as port,
        _started("echo", {"hidden_size": _ECHO_WIDTH, "server": {"log_level": "error"}}) as url,
    ):
        _ask("ready", url=url)
        small, large = (
            _ask("echoes", url=url, port=int(port), hidden=hidden, positions=size, times=times)
            for size, times in zip((_SMALL_ECHO, _LARGE_ECHO), scale.echoes, strict=True)
        )
    raw = percentile(small["raw"], 50)
    raw_large = percentile(large["raw"], 50)
    return [
        Row(
            "step without a model over a bare stream, 7 KB: p50",
            (percentile(small["steps"], 50) - raw) * _MS,
            "ms",
            "<=",
            scale.target(0.4),
            raw * _MS,
        ),
        Row(
            "step without a model against a bare stream, 3.7 MB: p50",
            percentile(large["steps"], 50) / raw_large,
            "x",
            "<=",
            scale.target(2.5),
            note=f"the bare stream takes {raw_large * _MS:.1f} ms",
        ),
    ]


def _idle(scale: _Scale) -> list[Row]:
    """Return the rows of sessions that do nothing."""
    server = {"max_sessions": scale.idle, "log_level": "error"}
    with _process("daemon", {**scale.model, "server": server}) as (process, url):
        _ask("ready", url=url)
        found = _ask(
            "idle",
            url=url,
            hidden=scale.hidden,
            sessions=scale.idle,
            pid=process.pid,
            cycles=scale.cycles,
        )
    flat = found["flat"]
    return [
        Row(
            f"an idle session, of {scale.idle:,}: memory besides its cache",
            (found["held"] - found["before"]) / scale.idle / _KB,
            "KB",
            "<=",
            scale.target(50),
        ),
        Row(
            f"{scale.cycles:,} sessions opened and closed: memory at the end over that at a tenth",
            (flat[-1] - flat[0]) / 1e6,
            "MB",
            "<=",
            scale.target(1),
        ),
    ]


# --- Processes -----------------------------------------------------------------------------


@contextmanager
def _daemon(scale: _Scale, sessions: int) -> Iterator[str]:
    """Serve the Trunk to so many, and wait until it is there and its pages are."""
    server = {"max_sessions": sessions + 1, "log_level": "error"}
    with _started("daemon", {**scale.model, "server": server}) as url:
        _ask("ready", url=url)
        _ask("streams", url=url, hidden=scale.hidden, sessions=1, prompt=8, new=2)
        yield url


@contextmanager
def _started(task: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Run a server, and yield its address."""
    with _process(task, arguments) as (_, address):
        yield address


@contextmanager
def _process(task: str, arguments: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server, and yield it and its address; it ends with the block."""
    process = subprocess.Popen(  # noqa: S603 - this very Python, and a module of our own
        _command(_SERVER, task, arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process, _line(process.stdout)
            if process.stdin is not None:
                process.stdin.close()
            process.wait(_STOP_SECONDS)
        finally:
            process.kill()


def _line(output: IO[str] | None) -> str:
    line = output.readline().strip() if output is not None else ""
    if not line:
        raise BenchError("the server ended before it said where it is")
    return line


def _task(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the reference, and return what it took."""
    return _figures(_command(_SERVER, task, arguments))


def _ask(task: str, **arguments: Any) -> dict[str, Any]:
    """Let the clients do a task, and return what they saw."""
    return _figures(_command(_CLIENT, task, arguments))


def _figures(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise BenchError(f"the measured process failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _command(module: str, task: str, arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", module, task, json.dumps(arguments)]


ROWS: dict[str, Callable[[_Scale], list[Row]]] = {
    "streams": _streams,
    "many": _many,
    "prompt": _prompt,
    "echo": _echo,
    "idle": _idle,
}
"""What `--rows` can name -> what measures it."""
