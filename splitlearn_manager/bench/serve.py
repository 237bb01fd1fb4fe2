"""What serving a Trunk costs: against the same part in one process, and against bare streams.

Server, clients and reference are processes of their own; the server and the reference compute with
one thread.  Each round measures what is compared one after the other, and a figure is the median of
its rounds' ratios.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from splitlearn_core.growing_layer import BLOCK
from splitlearn_manager.bench.checkpoints import QWEN2_0_5B, QWEN2_TINY, BenchCheckpoint
from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.serve_client import percentile
from splitlearn_manager.bench.serve_processes import ask, peer, process_of, reference, started

logger = logging.getLogger(__name__)

_OTHERS = ("vllm", "llama_cpp", "petals")
_MS = 1e3
_KB = 1e3
_ECHO_WIDTH = 3584
_SMALL_ECHO, _LARGE_ECHO = 1, 512


@dataclass(frozen=True)
class Kind:
    """In which form a part is served.

    Attributes:
        dtype: Of its values.
        quantization: How its linear layers are packed, if they are.
    """

    dtype: str
    quantization: str | None = None

    def __str__(self) -> str:
        return f"`{self.quantization}` {self.dtype}" if self.quantization else self.dtype


AS_IT_IS = Kind("bfloat16")
PACKED = (
    Kind("bfloat16", "prepacked"),
    Kind("float32", "prepacked"),
    Kind("float32", "fp16"),
    Kind("bfloat16", "int8"),
)
TARGETS = {
    (AS_IT_IS, 8): 0.9,
    (AS_IT_IS, 1): 0.95,
    (PACKED[0], 8): 1.2,
    (PACKED[0], 1): 1.4,
    (PACKED[2], 1): 2.5,
    (PACKED[3], 8): 2.5,
    (PACKED[3], 1): 2.5,
}
"""Kind and clients -> how many times as fast as a static batch of the plain part it should be."""


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
        holders: Sessions whose caches are measured, and one to begin with.
        held: Positions that each of them holds.
        promised: Whether the targets are meant for this size.
    """

    checkpoint: BenchCheckpoint
    points: tuple[int, int] = (4, 20)
    prompt: int = 128
    new: int = 64
    rounds: int = 2
    long_prompt: int = 8192
    usual: int = 20
    echoes: tuple[int, int] = (2000, 60)
    idle: int = 2000
    cycles: int = 10_000
    holders: int = 17
    held: int = 2000
    promised: bool = True

    def target(self, value: float | None) -> float | None:
        """Return a target, where the size is the one that it was promised for."""
        return value if self.promised else None

    def hidden(self, kind: Kind) -> list[Any]:
        """Return width and dtype of the hidden states."""
        return [self.checkpoint.shape.settings["hidden_size"], kind.dtype]

    @property
    def model(self) -> dict[str, Any]:
        """What a server, or the reference, is told of the model."""
        return {"model": str(self.checkpoint.folder), "points": list(self.points)}

    @property
    def trunk(self) -> str:
        """The part, in words."""
        return f"Trunk [{self.points[0]}, {self.points[1]}) of {self.checkpoint.shape.name}"


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
        scale = _Scale(tiny, (2, 4), 8, 4, 1, 64, 2, (20, 2), 40, 40, 3, 64, promised=False)
    scale.checkpoint.make()
    rows: list[Row] = []
    for group in groups:
        logger.info("measuring %s", group)
        rows += ROWS[group](scale)
    return Report.here(rows)


def _streams(scale: _Scale) -> list[Row]:
    """Return the rows of 8 clients and of 1, against a static batch in one process."""
    return [row for sessions in (8, 1) for row in _against_static(scale, sessions, (AS_IT_IS,))]


def _packed(scale: _Scale) -> list[Row]:
    """Return the same rows of a Trunk with packed layers, against the plain part's batch."""
    once = replace(scale, rounds=1)  # of four kinds each
    return [row for sessions in (8, 1) for row in _against_static(once, sessions, PACKED)]


def _against_static(scale: _Scale, sessions: int, kinds: Sequence[Kind]) -> list[Row]:
    """Return how many positions come in a second, as a share of what the plain part alone gives."""
    ratios: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    same_dtype: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    rates = []
    for number in range(scale.rounds):
        dtypes = {AS_IT_IS.dtype: 0, **{kind.dtype: 0 for kind in kinds}}
        alone = {dtype: _static(scale, Kind(dtype), sessions) for dtype in dtypes}
        rates.append(sessions * scale.new / alone[AS_IT_IS.dtype])
        for kind in kinds:
            seconds = _served(scale, kind, sessions)["seconds"]
            ratios[kind].append(alone[AS_IT_IS.dtype] / seconds)
            same_dtype[kind].append(alone[kind.dtype] / seconds)
            logger.info("%s, %d, round %d: %.2f", kind, sessions, number + 1, ratios[kind][-1])
    return [
        Row(
            f"{scale.trunk}, {kind}, {sessions} clients: positions a second, of a static batch of"
            f" plain {AS_IT_IS.dtype}",
            median(ratios[kind]),
            "x",
            ">=",
            scale.target(TARGETS.get((kind, sessions))),
            note=(
                f"prompt {scale.prompt}, {scale.new} new positions each, prompts included; the"
                f" static batch gives {median(rates):.1f} positions a second;"
                f" {median(same_dtype[kind]):.2f} of one of plain {kind.dtype}; rounds:"
                f" {scale.rounds}"
            ),
        )
        for kind in kinds
    ]


def _served(scale: _Scale, kind: Kind, sessions: int, threads: int = 1) -> dict[str, Any]:
    """Serve the Trunk to so many clients that all come at once; return what they saw."""
    with _daemon(scale, sessions, kind, threads) as url:
        return ask(
            "streams",
            url=url,
            hidden=scale.hidden(kind),
            sessions=sessions,
            prompt=scale.prompt,
            new=scale.new,
        )


def _static(scale: _Scale, kind: Kind, sessions: int) -> float:
    """Return the seconds of a static batch of the plain part in this dtype."""
    work = {"batch": sessions, "prompt": scale.prompt, "new": scale.new, "dtype": kind.dtype}
    return float(reference("static", {**scale.model, **work})["seconds"])


def _threads(scale: _Scale) -> list[Row]:
    """Return the rows of a server whose operations have two threads, against one."""
    rows = []
    for sessions in (8, 1):
        gains = []
        for _ in range(scale.rounds):
            one, two = (_served(scale, AS_IT_IS, sessions, n)["seconds"] for n in (1, 2))
            gains.append(one / two)
        rows.append(Row(f"`threads: 2` against 1, {sessions} clients", median(gains), "x", ">="))
    return rows


def _peers(scale: _Scale) -> list[Row]:
    """Return the rows of the whole model: transformers' ways, and a chain with its Trunk served."""
    rows = []
    for streams in (8, 1):
        work = {
            "model": str(scale.checkpoint.folder),
            "batch": streams,
            "prompt": scale.prompt,
            "new": scale.new,
        }
        base = peer("generate", work)
        name = f"whole model, {streams} streams: tokens a second"
        with _daemon(scale, streams, AS_IT_IS) as url:
            ours = peer("chain", {**work, "points": list(scale.points), "url": url})
        batched, why = _rate_of_peer("continuous", work)
        note = f"transformers' `generate`, one static batch, gives {base:.1f}; of that"
        rows += [
            Row(f"{name}, Bottom and Top here, {scale.trunk} served", ours, "/s", ">=", None, base),
            Row(f"{name}, of transformers' `generate`", ours / base, "x", ">=", note=note),
            Row(
                f"{name}, transformers' continuous batching, of its `generate`",
                None if batched is None else batched / base,
                "x",
                ">=",
                note=why or note,
            ),
        ]
    absent = [name for name in _OTHERS if find_spec(name) is None]
    present = [name for name in _OTHERS if name not in absent]
    rows.append(
        Row(
            f"servers with engines of their own: {', '.join(_OTHERS)}",
            None,
            "x",
            ">=",
            note="; ".join(
                [f"not installed here: {', '.join(absent)}"] * bool(absent)
                + [f"installed, and not driven by this benchmark: {', '.join(present)}"]
                * bool(present)
            ),
        )
    )
    return rows


def _rate_of_peer(task: str, work: dict[str, Any]) -> tuple[float | None, str]:
    """Return a peer's rate, or why it has none here."""
    try:
        return peer(task, work), ""
    except BenchError as error:
        return None, f"it failed here: {str(error).strip().splitlines()[-1]}"


def _many(scale: _Scale) -> list[Row]:
    """Return the rows of many sessions against few."""
    gains, tails = [], []
    own: list[float] = []
    for number in range(scale.rounds):
        if not own:
            alone = {n: n / _static(scale, AS_IT_IS, n) for n in (8, 32)}
        served = {n: _served(scale, AS_IT_IS, n) for n in (8, 32)}
        gains.append(4 * served[8]["seconds"] / served[32]["seconds"])
        own.append(alone[32] / alone[8])
        steps = served[32]["steps"]
        tails.append(percentile(steps, 99) / percentile(steps, 50))
        logger.info("round %d: %.2f, static %.2f", number + 1, gains[-1], own[-1])
    return [
        Row(
            "32 sessions against 8: throughput",
            median(gains),
            "x",
            ">=",
            scale.target(1.8),
            median(own),
            note="compared with what a static batch of the part gains from 8 to 32",
        ),
        Row("32 sessions: p99 of a step over p50", median(tails), "x", "<=", scale.target(4)),
    ]


def _prompt(scale: _Scale) -> list[Row]:
    """Return the row of steps while a long prompt comes."""
    with _daemon(scale, 9, AS_IT_IS) as url:
        served = ask(
            "beside",
            url=url,
            hidden=scale.hidden(AS_IT_IS),
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
        started("raw", {}) as port,
        started("echo", {"hidden_size": _ECHO_WIDTH, "server": {"log_level": "error"}}) as url,
    ):
        ask("ready", url=url)
        small, large = (
            ask("echoes", url=url, port=int(port), hidden=hidden, positions=size, times=times)
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


def _cache(scale: _Scale) -> list[Row]:
    """Return the row of what the KV caches of some sessions take."""
    settings = scale.checkpoint.shape.settings
    start = scale.points[0]
    layers = 2
    width = settings["hidden_size"] // settings["num_attention_heads"]
    token = 2 * layers * settings["num_key_value_heads"] * width * 2  # keys and values, bfloat16
    part = {**scale.model, "points": [start, start + layers], "dtype": AS_IT_IS.dtype}
    server = {"max_sessions": scale.holders, "log_level": "error"}
    with process_of("daemon", {**part, "server": server}) as (process, url):
        ask("ready", url=url)
        found = ask(
            "held",
            url=url,
            hidden=scale.hidden(AS_IT_IS),
            sessions=scale.holders - 1,
            pid=process.pid,
            prompt=scale.held,
        )
    sessions = scale.holders - 1
    blocks = sessions * BLOCK * token
    return [
        Row(
            f"memory of {sessions} sessions of {scale.held:,} tokens in {layers} layers, less a"
            " block each: of tokens times bytes a token",
            (found["bytes"] - blocks) / (sessions * scale.held * token),
            "x",
            "<=",
            scale.target(1.1),
            note=f"{token:,} bytes a token, blocks of {BLOCK}; anonymous memory of the server",
        )
    ]


def _idle(scale: _Scale) -> list[Row]:
    """Return the rows of sessions that do nothing."""
    server = {"max_sessions": scale.idle, "log_level": "error"}
    with process_of("daemon", {**scale.model, "server": server}) as (process, url):
        ask("ready", url=url)
        found = ask(
            "idle",
            url=url,
            hidden=scale.hidden(AS_IT_IS),
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


@contextmanager
def _daemon(scale: _Scale, sessions: int, kind: Kind, threads: int = 1) -> Iterator[str]:
    """Serve the Trunk to so many, and wait until it is there and its pages are."""
    server = {"max_sessions": sessions + 1, "threads": threads, "log_level": "error"}
    with started("daemon", {**scale.model, **asdict(kind), "server": server}) as url:
        ask("ready", url=url)
        ask("streams", url=url, hidden=scale.hidden(kind), sessions=1, prompt=8, new=2)
        yield url


ROWS: dict[str, Callable[[_Scale], list[Row]]] = {
    "streams": _streams,
    "packed": _packed,
    "threads": _threads,
    "many": _many,
    "peers": _peers,
    "prompt": _prompt,
    "echo": _echo,
    "idle": _idle,
    "cache": _cache,
}
"""What `--rows` can name -> what measures it."""
