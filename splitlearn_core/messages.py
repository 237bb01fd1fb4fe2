"""What messages show of values that nobody vouches for: short, in one line, printable."""

from __future__ import annotations

import reprlib

_LONGEST = 300

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100


def short(value: object) -> str:
    """Return a value's `repr`, cut so that a message stays readable whatever the value is."""
    return _brief.repr(value)


def in_one_line(error: BaseException) -> str:
    """Return another library's error, its type first, for a message of ours."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{type(error).__name__}: {shown if shown.isprintable() else ascii(shown)}"
