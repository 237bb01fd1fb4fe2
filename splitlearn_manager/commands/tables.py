"""Tables for people: columns as wide as their widest cell, numbers to the right, no wrapping."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = "  "


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows of cells as lines; the first row is the heading.

    Args:
        rows: Of the same number of cells each.
        left: So many columns are aligned to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths, left) for row in rows)


def layers(start: int, end: int) -> str:
    """Return `8-23` for the layers `[8, 24)`."""
    return f"{start}-{end - 1}" if end > start else "none"


def _line(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    """Return one row."""
    cells = [
        f"{cell:<{width}}" if number < left else f"{cell:>{width}}"
        for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return _GAP.join(cells).rstrip()
