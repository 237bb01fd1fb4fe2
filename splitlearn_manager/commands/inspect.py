"""`splitlearn inspect`: what lies in a weights file or folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitlearn_core.inspection import inspect as look
from splitlearn_manager.commands.errors import told_in_one_line
from splitlearn_manager.commands.options import AsJson
from splitlearn_manager.commands.tables import table
from splitlearn_manager.config.units import format_bytes

if TYPE_CHECKING:
    from splitlearn_core.inspection import Inspection


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="FILE|FOLDER", help="A weights file, or a folder with weights.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show names, shapes, dtypes and bytes of what is stored, without reading the values.

    Takes .safetensors, .pth, .pt and .bin files, and folders of models, parts, adapters and
    checkpoints of training.  Of a MiniMind file it says which architecture it is taken for.
    """
    with told_in_one_line():
        found = look(path)
    typer.echo(json.dumps(found.to_dict()) if as_json else describe(found))


def describe(found: Inspection) -> str:
    """Return what was found for people."""
    total = f"{len(found.tensors):,} tensors, {found.values:,} values, {format_bytes(found.nbytes)}"
    rows = [
        (t.name, t.dtype, str(list(t.shape)), format_bytes(t.nbytes), t.file) for t in found.tensors
    ]
    several = len({t.file for t in found.tensors}) > 1
    columns = 5 if several else 4
    heading = ("tensor", "dtype", "shape", "size", "file")
    lines = [f"{found.path}: {found.kind}, {total}", *_about(found.about)]
    if rows:
        lines += ["", table([row[:columns] for row in (heading, *rows)], left=3)]
    return "\n".join(lines)


def _about(about: Any) -> list[str]:
    """Return a line for each thing that is said besides."""
    return [f"{key}: {_shown(value)}" for key, value in about.items() if value not in (None, [])]


def _shown(value: Any) -> str:
    """Return a value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)
