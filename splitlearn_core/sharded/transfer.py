"""Tensors from rank 0 to the others, and from them to rank 0, a few MiB at a time.

They go through gloo and the CPU, whatever the ranks compute on: files are read and written there.
Each transfer has a deadline of its own, and its error names the rank that did not keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from splitlearn_core.errors import RankLostError

if TYPE_CHECKING:
    from splitlearn_core.sharded.meeting import Meeting

PIECE_BYTES = 4 * 1024 * 1024

Read = Callable[[str, int, torch.Tensor], None]
"""Fills a flat tensor with the values of a tensor, by name, from a value on."""


@dataclass(frozen=True)
class Run:
    """Values that one rank holds: of which tensor, from which on, how many, and as what."""

    name: str
    start: int
    count: int
    dtype: str

    @property
    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where the run is cut: first value of each piece, counted in the run, and its length."""
        step = max(1, PIECE_BYTES // self.torch_dtype.itemsize)
        return ((begin, min(step, self.count - begin)) for begin in range(0, self.count, step))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_list(self) -> list[Any]:
        """Return plain values."""
        return [self.name, self.start, self.count, self.dtype]


class Wires:
    """Connections among the ranks of a meeting."""

    def __init__(self, meeting: Meeting, group: dist.ProcessGroup | None) -> None:
        self._meeting = meeting
        self._group = group

    def send(self, values: torch.Tensor, rank: int) -> None:
        """Send a flat tensor on the CPU; raises `RankLostError` naming the rank that takes none."""
        with self._of(rank):
            dist.send(values.view(torch.uint8), rank, group=self._group)

    def receive(self, values: torch.Tensor, rank: int) -> None:
        """Fill a flat tensor on the CPU; raises `RankLostError` naming the rank that sends none."""
        with self._of(rank):
            dist.recv(values.view(torch.uint8), rank, group=self._group)

    @contextmanager
    def _of(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self._meeting.failure() or RankLostError(
                f"the connection with rank {rank} broke, or nothing came over it for"
                f" {self._meeting.timeout:g} s: it has died or hangs; look into its log",
                (rank,),
            ) from error


@contextmanager
def wires(meeting: Meeting) -> Iterator[Wires]:
    """Connect the ranks for the block; their failures are known before connections close."""
    if meeting.size == 1:
        yield Wires(meeting, None)
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=meeting.timeout))
    try:
        with meeting.attended():
            yield Wires(meeting, group)
    finally:
        dist.destroy_process_group(group)


def exchange_runs(meeting: Meeting, topic: str, runs: Sequence[Run]) -> list[list[Run]]:
    """Tell which runs this rank holds, and return those of every rank."""
    everybody = meeting.exchange(topic, [run.to_list() for run in runs])
    return [[Run(*fields) for fields in theirs] for theirs in everybody]


def hand_out(
    meeting: Meeting,
    wired: Wires,
    everybody: Sequence[Sequence[Run]],
    held: Mapping[str, torch.Tensor],
    read: Read | None,
    heard: Callable[[int], None],
) -> None:
    """Fill what each rank holds with what rank 0 reads.

    Every rank has the same tensors in the same order, and may hold none of one.

    Args:
        meeting: Of these ranks.
        wired: Their connections.
        everybody: The runs of every rank.
        held: This rank's values, by name: flat, on any device.
        read: Rank 0's alone.
        heard: Called with the bytes that came in, every few MiB; what it raises ends it all.
    """
    for runs in zip(*everybody, strict=True):
        meeting.sign(f"handing out {runs[0].name}")
        if read is not None:
            mine = runs[0]
            read(mine.name, mine.start, held[mine.name])
            _send_all(meeting, wired, runs, read)
        else:
            _take(meeting, wired, runs[meeting.rank], held[runs[0].name], heard)


def _send_all(meeting: Meeting, wired: Wires, runs: Sequence[Run], read: Read) -> None:
    """Read and send each other rank's run of one tensor, piece by piece, all ranks in turns."""
    left = {rank: run.pieces for rank, run in enumerate(runs) if rank}
    while left:
        for rank, pieces in list(left.items()):
            piece = next(pieces, None)
            if piece is None:
                del left[rank]
                continue
            begin, count = piece
            values = torch.empty(count, dtype=runs[rank].torch_dtype)
            read(runs[rank].name, runs[rank].start + begin, values)
            wired.send(values, rank)
            meeting.sign(f"sending {runs[rank].name} to rank {rank}")


def _take(
    meeting: Meeting, wired: Wires, run: Run, held: torch.Tensor, heard: Callable[[int], None]
) -> None:
    """Receive this rank's run."""
    for begin, count in run.pieces:
        piece = held[begin : begin + count]
        values = piece if piece.device.type == "cpu" else torch.empty(count, dtype=piece.dtype)
        wired.receive(values, 0)
        if values is not piece:
            piece.copy_(values)
        meeting.sign(f"receiving {run.name}")
        heard(values.nbytes)


def take_in(
    meeting: Meeting, wired: Wires, runs: Sequence[Run], held: torch.Tensor
) -> torch.Tensor | None:
    """Put one tensor together on rank 0, of what each rank holds.

    Args:
        meeting: Of these ranks.
        wired: Their connections.
        runs: Which values each rank holds, by rank; several may hold the same.
        held: This rank's: flat, on any device.

    Returns:
        On rank 0 the values, flat, on the CPU; on the others `None`.
    """
    meeting.sign(f"taking in {runs[0].name}")
    chosen = _covering(runs)
    if meeting.rank:
        if meeting.rank in chosen:
            run = runs[meeting.rank]
            for begin, count in run.pieces:
                wired.send(held[begin : begin + count].cpu().contiguous(), 0)
        return None
    whole = torch.empty(sum(runs[rank].count for rank in chosen), dtype=held.dtype)
    for rank in chosen:
        run = runs[rank]
        place = whole[run.start : run.start + run.count]
        if rank == 0:
            place.copy_(held)
            continue
        for begin, count in run.pieces:
            wired.receive(place[begin : begin + count], rank)
    return whole


def _covering(runs: Sequence[Run]) -> list[int]:
    """Return the ranks whose runs follow one another, of such as hold the same the first."""
    chosen: list[int] = []
    stop = 0
    for rank, run in sorted(enumerate(runs), key=lambda item: (item[1].start, item[0])):
        if run.count and run.start == stop:
            chosen.append(rank)
            stop += run.count
    return chosen
