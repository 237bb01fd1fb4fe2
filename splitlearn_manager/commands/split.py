"""`splitlearn split`: write a checkpoint's parts as folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

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
from splitlearn_manager.config.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_core.split_checkpoint import WrittenPart


def split(
    model: ModelName,
    split_points: SplitPoints,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the parts' folders.")],
    dtype: DType = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take the place of parts that lie in the folder.")
    ] = False,
    model_type: ModelType = AUTO,
    minimind: MiniMind = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_empty: AllowEmpty = False,
    allow_uncertified: AllowUncertified = False,
    as_json: AsJson = False,
) -> None:
    """Write each part as a folder that needs the original no more: OUT/bottom, OUT/trunk, OUT/top.

    A part's folder has its config, its weights (safetensors), a manifest with their hashes, and
    the tokenizer where text goes in or out.
    """
    with told_in_one_line():
        points = parse_points(split_points)
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

        from splitlearn_core.split_checkpoint import split_checkpoint  # noqa: PLC0415 - needs torch

        with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            written = split_checkpoint(
                model,
                points,
                out,
                model_type=model_type,
                minimind=told,
                dtype=dtype,
                cache_dir=cache_dir,
                revision=revision,
                allow_empty=allow_empty,
                allow_uncertified=allow_uncertified,
                force=force,
                progress=lambda done, total: _move(bar, done, total),
            )
    typer.echo(json.dumps(_to_dict(out, written)) if as_json else describe(written))


def _move(bar: tqdm[Any], done: int, total: int) -> None:
    """Show how far the writing is."""
    bar.total = total
    bar.update(done - bar.n)


def _to_dict(out: Path, written: Sequence[WrittenPart]) -> dict[str, Any]:
    """Return what was written, for JSON."""
    return {
        "out": str(out),
        "parts": [{"folder": str(p.folder), **p.manifest.to_dict()} for p in written],
    }


def describe(written: Sequence[WrittenPart]) -> str:
    """Return what was written, for people."""
    rows = [
        (
            str(part.folder),
            layers(part.manifest.spec.start_layer, part.manifest.spec.end_layer),
            part.manifest.dtype,
            f"{part.manifest.num_parameters:,}",
            format_bytes(part.nbytes),
        )
        for part in written
    ]
    return table([("folder", "layers", "dtype", "parameters", "size"), *rows], left=2)
