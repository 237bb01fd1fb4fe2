"""What a part costs to load: memory, time and bytes on the wire, beside what others take."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

from splitlearn_manager.bench import page_cache
from splitlearn_manager.bench.checkpoints import BenchCheckpoint
from splitlearn_manager.bench.hub_server import running_hub
from splitlearn_manager.bench.job import Way
from splitlearn_manager.bench.process import Measurement, measure
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.bench.workbench import Scale, Workbench, full_scale, quick_scale

logger = logging.getLogger(__name__)

MB = 1e6
_FLOAT32 = "float32"
_REPOSITORY = "bench/model"
_LATENCY = 0.02
_WIRE_RATE = 100 * MB


def run(work_dir: Path, groups: Sequence[str], *, quick: bool) -> Report:
    """Make the checkpoints that are needed, and measure.

    Args:
        work_dir: Holds the checkpoints, which stay there for the next run.
        groups: Which of `ROWS`.
        quick: Whether to take tiny models and no targets.

    Raises:
        BenchError: There is no room on the disk, or a measured process failed.
    """
    scale = (quick_scale if quick else full_scale)(work_dir)
    bench = Workbench(scale, work_dir)
    wanted = [checkpoint for group in groups for checkpoint in _needed(group, scale)]
    bench.prepare(wanted, scale.small.nbytes if "hub" in groups else 0)
    rows: list[Row] = []
    for group in groups:
        logger.info("measuring %s", group)
        rows += ROWS[group](bench)
    return Report.here(rows)


def _needed(group: str, scale: Scale) -> tuple[BenchCheckpoint, ...]:
    """Return the checkpoints that some rows are of."""
    special = {
        "all-parts": (scale.large,),
        "names": (scale.experts,),
        "hub": (scale.small, scale.small_sharded),
    }
    return special.get(group, (scale.small,))


def _stored(bench: Workbench) -> list[Row]:
    """Return the rows of a part as it is stored."""
    small = bench.scale.small
    jobs = {"part": bench.job("part", small), "whole": bench.job("transformers", small)}
    results = bench.each(jobs, lambda: page_cache.warm(small.files))
    part, whole = results["part"], results["whole"]
    nbytes = part[0].nbytes
    baseline = _seconds(whole)
    name = f"{bench.trunk} as stored, warm"
    return [
        _peak_row(
            f"{name}: peak anonymous memory, load and forward",
            part,
            whole,
            target=bench.target((0.03 * nbytes + 16 * MB) / MB),
            note=f"3 % of the part's {nbytes / MB:,.0f} MB, and 16 MB",
        ),
        Row(
            f"{name}: resident after one forward",
            max(m.resident for m in part) / MB,
            "MB",
            "<=",
            bench.target(1.05 * nbytes / MB),
            max(m.resident for m in whole) / MB,
            "1.05 of the part's bytes; compared with transformers' from_pretrained of the whole",
        ),
        Row(
            f"{name}: load",
            _seconds(part),
            "s",
            "<=",
            bench.target(max(1.2 * baseline, 0.3)),
            baseline,
            f"1.2 of transformers' from_pretrained of the whole, or 0.3 s; {bench.medians}",
        ),
    ]


def _cast(bench: Workbench) -> list[Row]:
    """Return the rows of a part that is cast to float32."""
    small = bench.scale.small
    jobs = {
        "part": bench.job("part", small, dtype=_FLOAT32),
        "whole": bench.job("transformers", small, dtype=_FLOAT32),
    }
    results = bench.each(jobs, lambda: page_cache.warm(small.files))
    part, whole = results["part"], results["whole"]
    nbytes = part[0].nbytes
    name = f"{bench.trunk} cast to float32, warm"
    return [
        _peak_row(
            f"{name}: peak anonymous memory, load and forward",
            part,
            whole,
            target=bench.target(1.06 * nbytes / MB),
            note=f"1.06 of the part's {nbytes / MB:,.0f} MB",
        ),
        Row(
            f"{name}: load",
            _seconds(part),
            "s",
            "<=",
            bench.target(0.3 * _seconds(whole)),
            _seconds(whole),
            f"0.3 of transformers' from_pretrained(dtype=float32) of the whole; {bench.medians}",
        ),
    ]


def _all_parts(bench: Workbench) -> list[Row]:
    """Return the row of all parts of the large model."""
    large = bench.scale.large
    jobs = {"parts": bench.job("parts", large)}
    results = bench.each(jobs, lambda: page_cache.drop(large.files), runs=1)["parts"]
    first, second = bench.scale.points
    name = f"Bottom, Trunk and Top of {large.shape.name}, cut at {first} and {second}, as stored"
    return [
        _peak_row(
            f"{name}, cold: peak anonymous memory, load and forward",
            results,
            target=bench.target(128),
            note=f"{large.nbytes / MB:,.0f} MB of weights; one run",
        )
    ]


def _cold(bench: Workbench) -> list[Row]:
    """Return the rows of a part whose file is not in the page cache."""
    small = bench.scale.small
    [file] = small.files
    spans = bench.spans(file)
    nbytes = sum(end - start for start, end in spans)
    jobs = {
        "mmap=False": bench.job("part", small, mmap=False, steps=("load",)),
        "mapped, every page touched": bench.job("part", small, steps=("load", "touch")),
    }
    plain: list[float] = []

    def read_plainly() -> None:
        page_cache.drop([file])
        plain.append(page_cache.read_spans(file, spans))
        page_cache.drop([file])

    results = bench.each(jobs, read_plainly)
    baseline = nbytes / median(plain) / MB
    return [
        Row(
            f"{bench.trunk} as stored, cold, {name}: rate",
            nbytes / _seconds(runs) / MB,
            "MB/s",
            ">=",
            bench.target(0.85 * baseline),
            baseline,
            f"0.85 of a plain sequential read of the same bytes; {bench.medians}",
        )
        for name, runs in results.items()
    ]


def _names(bench: Workbench) -> list[Row]:
    """Return the row of a checkpoint with very many tensors."""
    experts = bench.scale.experts
    jobs = {"plan": bench.job("plan", experts, steps=("load",))}
    results = bench.each(jobs, lambda: page_cache.warm(experts.files))
    return [
        Row(
            f"{len(experts.tensors):,} tensors of {experts.shape.name}, warm: planned",
            _seconds(results["plan"]),
            "s",
            "<=",
            bench.target(3),
            None,
            f"all layers, from index and headers, after imports; {bench.medians}",
        )
    ]


_PEERS: dict[Way, str] = {
    "transformers": "transformers' from_pretrained",
    "accelerate": "accelerate's load_checkpoint_and_dispatch",
    "traditional": "the traditional way (ModelFactory, low_memory=False)",
    "parts": "the incremental way (ModelFactory, low_memory=True)",
}


def _peers(bench: Workbench) -> list[Row]:
    """Return the rows of the other ways to have the whole model, without targets."""
    small = bench.scale.small
    rows: list[Row] = []
    for dtype in (None, _FLOAT32):
        jobs = {way: bench.job(way, small, dtype=dtype) for way in _PEERS if _is_here(way)}
        results = bench.each(
            {str(way): job for way, job in jobs.items()},
            lambda: page_cache.warm(small.files),
            runs=min(3, bench.scale.runs),
        )
        for way, title in _PEERS.items():
            name = f"{title}, all of {small.shape.name}, {_dtype_said(dtype)}, warm"
            rows += _peer_rows(name, way, results.get(way))
    return rows


def _peer_rows(name: str, way: Way, runs: list[Measurement] | None) -> list[Row]:
    if runs is None:
        return [Row(f"{name}: load", None, "s", "<=", note=f"{way} can't be imported")]
    return [
        Row(f"{name}: load", _seconds(runs), "s", "<=", note=f"median of {len(runs)}"),
        _peak_row(f"{name}: peak anonymous memory, load and forward", runs),
    ]


def _is_here(way: Way) -> bool:
    return way != "accelerate" or importlib.util.find_spec("accelerate") is not None


def _dtype_said(dtype: str | None) -> str:
    return "as stored" if dtype is None else f"cast to {dtype}"


def _hub(bench: Workbench) -> list[Row]:
    """Return the rows of a part that comes from a hub."""
    scale = bench.scale
    return [
        row
        for layout, checkpoint in (("one file", scale.small), ("sharded", scale.small_sharded))
        for row in _hub_rows(bench, layout, checkpoint)
    ]


def _hub_rows(bench: Workbench, layout: str, checkpoint: BenchCheckpoint) -> list[Row]:
    latency, rate = (_LATENCY, _WIRE_RATE) if bench.scale.promised else (0.0, None)
    with running_hub(checkpoint.folder, latency, rate) as hub, _empty_hub_cache(checkpoint) as home:
        job = bench.job("part", checkpoint, steps=("load",), cache_dir=str(home / "ours"))
        environment = _hub_environment(hub.address, home)
        result = measure(replace(job, model=_REPOSITORY), environment)
        sent = hub.bytes_sent()
    headers = bench.header_bytes(checkpoint)
    name = f"{bench.trunk} from a hub on loopback, {layout}"
    said = f"{latency * 1000:.0f} ms added to each request" if rate else "no limits"
    return [
        Row(
            f"{name}: bytes fetched",
            sent / MB,
            "MB",
            "<=",
            bench.target((1.01 * result.nbytes + headers) / MB),
            result.nbytes / MB,
            f"1.01 of the part's bytes, and {headers:,} bytes of headers; all files counted",
        ),
        Row(
            f"{name}: rate",
            result.nbytes / result.seconds / MB,
            "MB/s",
            ">=",
            bench.target(0.8 * _WIRE_RATE / MB),
            rate / MB if rate else None,
            f"0.8 of what all connections have together; {said}; one run, planning included",
        ),
    ]


@contextmanager
def _empty_hub_cache(checkpoint: BenchCheckpoint) -> Iterator[Path]:
    """Make a folder for what is fetched; it goes when the block ends."""
    with tempfile.TemporaryDirectory(dir=checkpoint.work_dir, prefix=".hub-") as folder:
        yield Path(folder)


def _hub_environment(address: str, home: Path) -> dict[str, str]:
    """Return what keeps the hub's client to the loopback hub, and away from the user's login."""
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "client"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _seconds(runs: list[Measurement]) -> float:
    return median(run.seconds for run in runs)


def _peak_row(
    name: str,
    runs: list[Measurement],
    whole: list[Measurement] | None = None,
    target: float | None = None,
    note: str = "",
) -> Row:
    """Return the highest peak of several runs, beside that of the whole model."""
    peak = max(run.peak_anonymous for run in runs) / MB
    baseline = max(run.peak_anonymous for run in whole) / MB if whole else None
    compared = "; compared with transformers' from_pretrained of the whole" if whole else ""
    return Row(name, peak, "MB", "<=", target, baseline, note + compared)


ROWS: dict[str, Callable[[Workbench], list[Row]]] = {
    "stored": _stored,
    "cast": _cast,
    "all-parts": _all_parts,
    "cold": _cold,
    "names": _names,
    "peers": _peers,
    "hub": _hub,
}
"""What `--rows` can name -> what measures it."""
