"""`splitlearn architectures`: what can be split, as it was last certified."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from splitlearn_core.families import CERTIFIED, KNOWN_TYPES, architectures, certified_dtypes


def list_architectures(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List every type of causal language model, and whether it can be split."""
    known = architectures()
    if as_json:
        typer.echo(json.dumps({name: asdict(entry) for name, entry in known.items()}))
        return
    width = max(map(len, known))
    for name, entry in known.items():
        tail = "" if entry.status == CERTIFIED else f"  {entry.reason}"
        typer.echo(f"{name:<{width}}  {entry.status:<9}{tail}".rstrip())
    dtypes = " and ".join(certified_dtypes())
    typer.echo(f"{len(KNOWN_TYPES)} of {len(known)} certified, in {dtypes}")
