"""`splitlearn plan`: what a split will cost, from config and headers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn_core.errors import DoesNotFitError
from splitlearn_manager.commands.errors import told_in_one_line
from splitlearn_manager.commands.options import (
    AUTO,
    AllowEmpty,
    AllowUncertified,
    AsJson,
    CacheDir,
    DType,
    MiniMind,
    ModelName,
    ModelType,
    Revision,
    SplitPoints,
    check_dtype,
    check_model,
    parse_minimind,
    parse_points,
)
from splitlearn_manager.commands.tables import layers, table
from splitlearn_manager.config.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from splitlearn_core.report import CutReport, PartReport, PlanReport


def plan(
    model: ModelName,
    split_points: SplitPoints,
    dtype: DType = None,
    device: Annotated[str | None, typer.Option(help="Device of every part.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread the parts over this machine's devices.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of the machine that each part is for (24GiB); default: here."),
    ] = None,
    model_type: ModelType = AUTO,
    minimind: MiniMind = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_empty: AllowEmpty = False,
    allow_uncertified: AllowUncertified = False,
    as_json: AsJson = False,
) -> None:
    """Say what each part of a split needs: bytes on disk, to fetch, in memory, on the wire.

    Reads the config and headers only.  Exit code 2 where a part can't fit.
    """
    with told_in_one_line():
        points = parse_points(split_points)
        dtype = check_dtype(dtype)
        limit = None if memory is None else _memory(memory)
        told = parse_minimind(minimind)
        check_model(
            model,
            points,
            model_type=model_type,
            minimind=told,
            allow_empty=allow_empty,
            allow_uncertified=allow_uncertified,
        )

        from splitlearn_core.report import report_plan  # noqa: PLC0415 - needs torch

        try:
            report = report_plan(
                model,
                points,
                model_type=model_type,
                minimind=told,
                dtype=dtype,
                device=device,
                device_map=device_map,
                memory=limit,
                allow_empty=allow_empty,
                allow_uncertified=allow_uncertified,
                cache_dir=cache_dir,
                revision=revision,
            )
        except DoesNotFitError as error:
            typer.echo(_show(error.report, as_json=as_json))
            raise
    typer.echo(_show(report, as_json=as_json))


def _memory(text: str) -> int:
    """Return the bytes that `24GiB` means."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--memory {error}, found {text!r}") from error


def _show(report: PlanReport, *, as_json: bool) -> str:
    """Return the report as JSON, or for people."""
    return json.dumps(report.to_dict()) if as_json else describe(report)


def describe(report: PlanReport) -> str:
    """Return a report for people."""
    cuts = ", ".join(map(str, report.split_points))
    rows = [_HEADING, *map(_row, (*report.parts, report.whole))]
    free = format_bytes(report.available_bytes)
    return "\n".join(
        [
            f"{report.model}: {report.model_type}, {report.num_layers} layers, {report.dtype}",
            f"cut at {cuts}",
            "",
            table(rows, left=3),
            "",
            *map(_crossing, report.cuts),
            *(_warning(cut, *told) for cut in report.cuts for told in cut.reveals.items()),
            "",
            *_home(report),
            "",
            f"this machine has {format_bytes(report.host_bytes)} of memory, {free} of it free now",
            report.advice,
        ]
    )


def _home(report: PlanReport) -> list[str]:
    """Return what a machine with Bottom and Top alone holds, fetches and sends."""
    home = report.home
    fetched = format_bytes(home.download_bytes) if home.download_bytes else "nothing"
    held, peak = format_bytes(home.steady_bytes), format_bytes(home.peak_bytes)
    cache = _known(home.kv_bytes_per_token)
    return [
        "with Bottom and Top at home, and the Trunk elsewhere, this machine",
        f"  holds     {held}, {peak} while it loads, and {cache} of KV cache for each token",
        f"  fetches   {fetched}",
        f"  sends     {_known(home.sent_bytes_per_token)} for each token",
        f"  receives  {_known(home.received_bytes_per_token)} for each token",
    ]


def _known(size: int | None) -> str:
    """Return a size, where it is known."""
    return "an unknown number of bytes" if size is None else format_bytes(size)


_HEADING = (
    *("part", "layers", "device", "parameters", "on disk"),
    *("to fetch", "memory", "at peak", "KV/token"),
)


def _row(part: PartReport) -> tuple[str, ...]:
    """Return a part's line in the table."""
    sizes = (part.disk_bytes, part.download_bytes, part.steady_bytes, part.peak_bytes)
    kv_bytes = part.kv_bytes_per_token
    return (
        "(whole)" if part.component == "full" else part.component,
        layers(part.start_layer, part.end_layer),
        part.device,
        f"{part.parameters / 1e6:,.1f}M",
        *(format_bytes(size) if size else "-" for size in sizes),
        "unknown" if kv_bytes is None else format_bytes(kv_bytes),
    )


def _crossing(cut: CutReport) -> str:
    """Return what goes over the wire at a cut."""
    size = _known(cut.bytes_per_token)
    return f"{cut.before} -> {cut.after}: {', '.join(cut.crosses)}, {size} for each token"


def _warning(cut: CutReport, name: str, reveals: str) -> str:
    """Return what a value tells whoever gets it."""
    return f"warning: {name} ({cut.before} -> {cut.after}) reveals {reveals}"
