"""Which bytes to ask a server for, and where they belong in the file of the part.

Pure arithmetic: no network, no files.  Spans are half open, `(first byte, one past the last)`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise

from splitlearn_core.headers import DTYPE_BYTES, LENGTH_BYTES, TensorInfo

Span = tuple[int, int]

# A gap between two wanted tensors is fetched with them, and thrown away, where that costs less
# than a request of its own; all gaps together may add this share to what is wanted.
MAX_GAP_BYTES = 128 * 1024
MAX_GAP_SHARE = 0.005

_ALIGNMENT = 64


@dataclass(frozen=True)
class Located:
    """A tensor and the file that it lies in."""

    file: str
    info: TensorInfo


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor: where they lie in their file, and where in the part's file.

    Attributes:
        tensor: Its name.
        file: The file it lies in.
        start: First byte in `file`.
        end: One past the last.
        target: Where the first byte belongs in the part's file.
    """

    tensor: str
    file: str
    start: int
    end: int
    target: int

    @property
    def target_span(self) -> Span:
        """Where the bytes belong in the part's file."""
        return self.target, self.target + self.end - self.start

    def within(self, start: int, end: int) -> Piece:
        """Return what of it lies in `[start, end)` of its file."""
        first = max(self.start, start)
        shifted = self.target + first - self.start
        return replace(self, start=first, end=min(self.end, end), target=shifted)


@dataclass(frozen=True)
class Request:
    """One range to ask for: pieces in the order of their bytes, with gaps between some."""

    pieces: tuple[Piece, ...]

    @property
    def file(self) -> str:
        """The file that they lie in."""
        return self.pieces[0].file

    @property
    def start(self) -> int:
        """First byte to ask for."""
        return self.pieces[0].start

    @property
    def end(self) -> int:
        """One past the last byte to ask for."""
        return self.pieces[-1].end

    @property
    def wanted_bytes(self) -> int:
        """Bytes that are kept of it."""
        return sum(piece.end - piece.start for piece in self.pieces)

    def kept(self, start: int, end: int) -> Iterator[Piece]:
        """Return what is kept of the bytes `[start, end)`."""
        first = bisect_right(self.pieces, start, key=lambda piece: piece.end)
        for piece in islice(self.pieces, first, None):
            if piece.start >= end:
                return
            yield piece.within(start, end)


@dataclass(frozen=True)
class Layout:
    """The safetensors file of a part, before its tensors are there.

    Attributes:
        prefix: The header with its length: all that precedes the tensors.
        pieces: Where each tensor comes from, and where it goes; those without bytes left out.
        size: Length of the file.
    """

    prefix: bytes
    pieces: tuple[Piece, ...]
    size: int


def lay_out(tensors: Mapping[str, Located], metadata: Mapping[str, str]) -> Layout:
    """Lay out a file of `tensors`, neighbours in their files staying neighbours.

    Wider dtypes come first, as the format's own writer has it: so every tensor is aligned, though
    nothing lies between them.
    """
    ordered = sorted(tensors.items(), key=_file_order)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, located in ordered:
        end = position + located.info.nbytes
        entries[name] = {
            "dtype": located.info.dtype,
            "shape": list(located.info.shape),
            "data_offsets": [position, end],
        }
        position = end
    prefix = _prefix(entries)
    return Layout(prefix, tuple(_pieces(ordered, len(prefix))), len(prefix) + position)


def plan_requests(
    pieces: Iterable[Piece],
    max_bytes: int,
    max_gap: int = MAX_GAP_BYTES,
    gap_share: float = MAX_GAP_SHARE,
) -> list[Request]:
    """Join neighbouring pieces into few requests of at most `max_bytes`.

    Args:
        pieces: What is wanted.
        max_bytes: Longer runs are cut into equal requests.
        max_gap: A longer gap is never fetched.
        gap_share: Bytes of all gaps together, as a share of what is wanted.
    """
    ordered = sorted(pieces, key=lambda piece: (piece.file, piece.start))
    limit = _affordable_gap(ordered, max_gap, gap_share)
    return [request for run in _runs(ordered, limit) for request in _cut(run, max_bytes)]


def without(pieces: Iterable[Piece], done: Iterable[Span]) -> list[Piece]:
    """Return what is left of `pieces` when the spans `done` of the part's file are there."""
    spans = merged(done)
    left: list[Piece] = []
    for piece in pieces:
        first, last = piece.target_span
        for start, end in _missing(first, last, spans):
            offset = piece.start - piece.target
            left.append(piece.within(start + offset, end + offset))
    return left


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return the same bytes as few spans, in order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        elif start < end:
            result.append((start, end))
    return result


def _file_order(item: tuple[str, Located]) -> tuple[int, str, int, str]:
    name, located = item
    return -DTYPE_BYTES[located.info.dtype], located.file, located.info.start, name


def _prefix(entries: Mapping[str, object]) -> bytes:
    """Return a header and its length, padded so that the tensors begin at a cache line."""
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(LENGTH_BYTES + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _pieces(ordered: Iterable[tuple[str, Located]], target: int) -> Iterator[Piece]:
    """Return each tensor as one piece, one after the other from `target` on."""
    for name, located in ordered:
        if located.info.nbytes:
            yield Piece(name, located.file, located.info.start, located.info.end, target)
            target += located.info.nbytes


def _affordable_gap(ordered: list[Piece], max_gap: int, share: float) -> int:
    """Return the longest gap such that all gaps up to it stay within the share."""
    budget = share * sum(piece.end - piece.start for piece in ordered)
    gaps = sorted(gap for gap in map(_gap, pairwise(ordered)) if gap is not None)
    affordable = 0
    for gap, equals in groupby(gaps):
        budget -= gap * len(list(equals))
        if gap > max_gap or budget < 0:
            break
        affordable = gap
    return affordable


def _gap(neighbours: tuple[Piece, Piece]) -> int | None:
    """Return the bytes between two pieces, if they lie in the same file."""
    before, after = neighbours
    return after.start - before.end if before.file == after.file else None


def _runs(ordered: list[Piece], limit: int) -> Iterator[list[Piece]]:
    """Group pieces between which there are no gaps, or short ones."""
    run: list[Piece] = []
    for piece in ordered:
        gap = _gap((run[-1], piece)) if run else None
        if run and (gap is None or gap > limit):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _cut(run: list[Piece], max_bytes: int) -> Iterator[Request]:
    """Cut a run into requests of about the same length; none begins or ends with a gap."""
    start, end = run[0].start, run[-1].end
    count = -(-(end - start) // max_bytes)
    edges = [start + (end - start) * i // count for i in range(count + 1)]
    whole = Request(tuple(run))
    for first, last in pairwise(edges):
        if pieces := tuple(whole.kept(first, last)):
            yield Request(pieces)


def _missing(first: int, last: int, spans: Sequence[Span]) -> Iterator[Span]:
    """Return what of `[first, last)` the spans, merged and in order, leave out."""
    begin = bisect_right(spans, first, key=lambda span: span[1])
    for start, end in islice(spans, begin, None):
        if start >= last:
            break
        if first < start:
            yield first, start
        first = end
    if first < last:
        yield first, last
