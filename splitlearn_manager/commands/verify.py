"""`splitlearn verify`: compare parts with the unsplit model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn_manager.commands.errors import FAILED, told_in_one_line
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
    OptionalSplitPoints,
    Revision,
    check_dtype,
    check_model,
    parse_minimind,
    parse_points,
)
from splitlearn_manager.commands.tables import table

if TYPE_CHECKING:
    from splitlearn_core.verify import Check, VerifyReport


def verify(
    model: ModelName,
    split_points: OptionalSplitPoints = None,
    dtype: DType = None,
    device: Annotated[str, typer.Option(help="Where both run.")] = "cpu",
    parts: Annotated[
        Path | None, typer.Option(help="Saved parts (splitlearn split) to compare instead.")
    ] = None,
    layerwise: Annotated[
        bool | None,
        typer.Option(
            "--layerwise/--whole",
            help="One layer of the unsplit model in memory at a time; default: where it must be.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference that passes; 0: to the bit.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random input.")] = 0,
    model_type: ModelType = AUTO,
    minimind: MiniMind = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_empty: AllowEmpty = False,
    allow_uncertified: AllowUncertified = False,
    as_json: AsJson = False,
) -> None:
    """Compare the parts of a model with the unsplit model on random input.

    Logits, hidden states, cached decode, a padded batch, greedy generation, gradients.  Exit code
    1 where they differ.
    """
    with told_in_one_line():
        points = parse_points(split_points or ()) if split_points or parts is None else None
        dtype = check_dtype(dtype)
        told = parse_minimind(minimind)
        check_model(
            model,
            points,
            model_type=model_type,
            minimind=told,
            allow_empty=allow_empty,
            allow_uncertified=allow_uncertified,
        )

        from splitlearn_core.verify import verify as run  # noqa: PLC0415 - needs torch

        _quiet()
        report = run(
            model,
            points,
            dtype=dtype,
            model_type=model_type,
            minimind=told,
            device=device,
            parts=parts,
            layerwise=layerwise,
            tolerance=tolerance,
            seed=seed,
            cache_dir=cache_dir,
            revision=revision,
            allow_empty=allow_empty,
            allow_uncertified=allow_uncertified,
        )
    typer.echo(json.dumps(report.to_dict()) if as_json else describe(report))
    if not report.passed:
        raise typer.Exit(FAILED)


def _quiet() -> None:
    """Let transformers show bars to people alone."""
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 - needs torch

    if not sys.stderr.isatty():
        disable_progress_bar()


def describe(report: VerifyReport) -> str:
    """Return a report for people."""
    cuts = ", ".join(map(str, report.split_points))
    heading = ("check", "result", "largest difference", "of values up to", "compared")
    verdict = (
        "the parts compute what the unsplit model computes"
        if report.passed
        else "the parts do NOT compute what the unsplit model computes"
    )
    return "\n".join(
        [
            f"{report.model}: {report.model_type}, {report.dtype}",
            f"cut at {cuts}, on {report.device}, seed {report.seed}",
            f"{report.mode}: {report.reason}",
            "",
            table([heading, *map(_row, report.checks)], left=2),
            *(f"{check.name}: {check.detail}" for check in report.checks if check.detail),
            "",
            f"{verdict} ({report.seconds:.1f} s, {report.threads} threads)",
        ]
    )


def _row(check: Check) -> tuple[str, ...]:
    """Return a check's line in the table."""
    return (
        check.name,
        check.status,
        _figure(check.max_abs_difference),
        _figure(check.largest),
        f"{check.compared:,}" if check.compared else "-",
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
