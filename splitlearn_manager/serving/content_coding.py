"""`Content-Encoding`: bodies compressed with gzip or deflate, both ways."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from splitlearn_manager.serving.infer_errors import (
    BadInferError,
    BodyTooLargeError,
    UnsupportedEncodingError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Buffer = bytes | bytearray | memoryview

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # deflate is zlib's format
_PIECE = 1 << 20
_LEVEL = 1  # activations hardly shrink, whatever is spent on them


def coding_of(header: str | None) -> str | None:
    """Return the coding that `Content-Encoding` names, or `None` for a body that is as it is.

    Raises:
        UnsupportedEncodingError: It names another than gzip or deflate, or several.
    """
    name = (header or "identity").strip().lower()
    name = {"identity": "", "x-gzip": "gzip"}.get(name, name)
    if name and name not in _WINDOWS:
        raise UnsupportedEncodingError(
            f"Content-Encoding must be gzip or deflate, or left out, found {name[:40]!r}"
        )
    return name or None


def wanted_coding(header: str | None) -> str | None:
    """Return the coding that a client asks for with `Accept-Encoding`, or `None`.

    Only a client that names gzip or deflate alone asks for it.  Those that list all they can read,
    as most do by themselves, get the body as it is: compressing costs time, and hardly pays.
    """
    name, _, quality = (header or "").lower().replace(" ", "").partition(";")
    refused = quality.startswith("q=0") and not quality.strip("q=0.")
    return name if name in _WINDOWS and not refused else None


def decompress(body: Buffer, coding: str, limit: int) -> bytearray:
    """Return a body as it was, never holding more than `limit` bytes of it.

    Raises:
        BodyTooLargeError: It would be longer than that.
        BadInferError: It is damaged, or cut off, or something follows it.
    """
    engine = zlib.decompressobj(_WINDOWS[coding])
    whole = bytearray()
    try:
        for start in range(0, len(body), _PIECE):
            if engine.eof:
                break
            # No more than one byte beyond the limit: what is held back then is never asked for.
            whole += engine.decompress(body[start : start + _PIECE], limit + 1 - len(whole))
            _check_length(whole, limit)
    except zlib.error:
        raise BadInferError(f"the body is not {coding}") from None
    if not engine.eof:
        raise BadInferError(f"the {coding} body is cut off")
    if engine.unused_data or start + _PIECE < len(body):
        raise BadInferError(f"something follows the {coding} body")
    return whole


def _check_length(whole: bytearray, limit: int) -> None:
    if len(whole) > limit:
        raise BodyTooLargeError(
            f"the decompressed body is longer than {limit} bytes (server.max_frame_bytes)"
        )


def compress(pieces: Iterable[Buffer], coding: str) -> Iterator[bytes]:
    """Yield a body, given in pieces, as it travels."""
    engine = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOWS[coding])
    for piece in pieces:
        for start in range(0, len(piece), _PIECE):
            yield engine.compress(piece[start : start + _PIECE])
    yield engine.flush()
