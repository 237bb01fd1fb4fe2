"""JSON that may hold millions of numbers, read and written in pieces.

The standard library reads and writes a whole document in one call that lets no other thread run:
for tens of megabytes that would be seconds in which an event loop stands still.  Here no call is
about more than some ten thousand characters.
"""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORT = 64 * 1024
"""Characters below which the standard library may read a document at once."""

PIECE = 32 * 1024
"""Characters, about, that are read in one call."""

NUMBERS = 4096
"""Numbers that are written in one call."""

MOST_CONTAINERS = 100_000
"""Arrays and objects that a long document may have: a real one has one for each row of a tensor."""

MOST_LEVELS = 32


def read_json(document: bytes | bytearray | memoryview) -> Any:
    """Return the value of a document, which may have `NaN`, `Infinity` and `-Infinity` in it.

    Raises:
        ValueError: It is not JSON, nested too deeply, or of too many arrays and objects.
    """
    text = str(document, "utf-8")
    try:
        return json.loads(text) if len(text) <= SHORT else _LongDecoder().decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_numbers(values: memoryview) -> Iterator[bytes]:
    """Yield the text between the brackets of an array of numbers, or of booleans.

    A float32 is written as the float64 of the same value, with as many digits as that needs, so
    that whoever reads it back gets the very same float32.  What is no number is `NaN`, `Infinity`
    or `-Infinity`, which is not JSON, but what Python's and Triton's readers take.

    Args:
        values: One-dimensional, of format `f`, `d`, `i`, `q`, `B`, `?` or the like.
    """
    for start in range(0, len(values), NUMBERS):
        piece = json.dumps(values[start : start + NUMBERS].tolist(), separators=(",", ":"))
        yield (b"," if start else b"") + piece[1:-1].encode()


class _LongDecoder(json.JSONDecoder):
    """Reads a document with the library's own scanner, and long runs of numbers in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._containers = 0
        self._levels = 0
        self._read_object: Any = json.decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_object: Any = self._object
        self._read_array: Any = json.decoder.JSONArray  # type: ignore[attr-defined]
        self.parse_array: Any = self._array
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _object(self, place: tuple[str, int], *rest: Any) -> tuple[Any, int]:
        with self._container():
            found: tuple[Any, int] = self._read_object(place, *rest)
        return found

    def _array(self, place: tuple[str, int], scan_once: Any) -> tuple[list[Any], int]:
        with self._container():
            text, start = place
            end = text.find("]", start)
            if end < 0:
                raise json.JSONDecodeError("Expecting ']'", text, len(text))
            if any(text.find(other, start, end) >= 0 for other in '[{"'):
                found: tuple[list[Any], int] = self._read_array(place, scan_once)
                return found
            return _numbers(text, start, end), end + 1

    @contextmanager
    def _container(self) -> Iterator[None]:
        """Count an array or object, and how deep it is."""
        self._containers += 1
        self._levels += 1
        if self._containers > MOST_CONTAINERS:
            raise ValueError(f"it has more than {MOST_CONTAINERS} arrays and objects")
        if self._levels > MOST_LEVELS:
            raise ValueError("it is nested too deeply")
        yield
        self._levels -= 1


def _numbers(text: str, start: int, end: int) -> list[Any]:
    """Return the values of an array that has no arrays, objects or strings in it."""
    values: list[Any] = []
    while True:
        comma = text.find(",", min(start + PIECE, end), end)
        stop = end if comma < 0 else comma
        piece = json.loads(f"[{text[start:stop]}]")
        if values and not piece:
            raise json.JSONDecodeError("Expecting value", text, stop)
        values += piece
        if comma < 0:
            return values
        start = comma + 1
