"""`splitlearn bench`: measure, on this machine, the figures that the documents promise."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from splitlearn_core.errors import SplitLearnError
from splitlearn_core.loading.files import cache_folder
from splitlearn_manager.bench import BENCHMARKS, Benchmark


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Where checkpoints are made, and stay; the cache folder when left out."),
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="Measure these rows alone; repeat for several.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models, no targets: see that everything runs.")
    ] = False,
) -> None:
    """Measure against targets and peers, each way in a fresh process.

    Checkpoints have random weights and are made here; no network is needed.  A target that is
    missed is a result, not a failure: the exit code is 0.
    """
    benchmark = _find(name)
    chosen = _choose(benchmark, rows)
    folder = (work_dir or cache_folder(None) / "bench").expanduser().resolve()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    module = importlib.import_module(benchmark.module)  # needs torch
    try:
        report = module.run(folder, chosen, quick=quick)
    except (SplitLearnError, OSError) as error:
        sys.stderr.write(f"splitlearn: {error}\n")
        raise typer.Exit(1) from error
    typer.echo(json.dumps(report.to_dict()) if as_json else report.to_table())
    sys.stderr.write(f"the checkpoints are in {folder}; delete it when they are no longer needed\n")


def _find(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise typer.BadParameter(
            f"there is no benchmark {name!r}; there is {', '.join(BENCHMARKS)}", param_hint="NAME"
        )
    return BENCHMARKS[name]


def _choose(benchmark: Benchmark, rows: list[str] | None) -> list[str]:
    """Return the rows to measure, in the benchmark's own order."""
    if unknown := sorted(set(rows or ()) - set(benchmark.rows)):
        raise typer.BadParameter(
            f"no rows {', '.join(unknown)}; there are {', '.join(benchmark.rows)}",
            param_hint="--rows",
        )
    return [row for row in benchmark.rows if not rows or row in rows]
