"""Reading a piece of a stored tensor into memory that is there already.

A piece is a run of values of the flattened tensor: in a safetensors file, a run of bytes.  It is
read straight to where it belongs; where it is cast on the way, or goes to another device, 4 MiB of
it at a time pass through a buffer.  Nothing is mapped, so that no page of a file counts as this
process's.  What a converter makes of several tensors, and what lies in torch files, is made whole
first, one at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from splitlearn_core.errors import CheckpointError
from splitlearn_core.loading.conversion import convert
from splitlearn_core.loading.sources import PlacedSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.headers import TensorInfo
    from splitlearn_core.loading.materialize import PartReads
    from splitlearn_core.loading.names import Recipe
    from splitlearn_core.loading.sources import TensorSource

_PIECE_BYTES = 4 * 1024 * 1024
_SAMPLE_BYTES = 256
_SAMPLES = 3


@dataclass
class ReadCount:
    """Bytes that were read from files."""

    nbytes: int = 0


class PieceReader:
    """Reads pieces of a part's tensors.

    Attributes:
        count: What has been read so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reads: PartReads,
        source: TensorSource,
        heard: Callable[[int], None],
    ) -> None:
        """Prepare to read.

        Args:
            model: The shell's, for converters.
            reads: What the part needs.
            source: Where it lies; prepared.
            heard: Called with the bytes read, every few MiB; what it raises ends the reading.
        """
        self.count = ReadCount()
        self._model = model
        self._reads = reads
        self._source = source
        self._heard = heard
        self._descriptors: dict[Path, int] = {}
        self._made: tuple[Recipe, dict[str, torch.Tensor]] | None = None

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read values of a tensor.

        Args:
            name: The part's name for it.
            start: First value, counted in the flattened tensor.
            out: Flat and contiguous; filled with the values from `start` on, cast to its dtype.

        Raises:
            CheckpointError: (a `ValueError`) The file is shorter than its header says, or gone.
        """
        if not out.numel():
            return
        recipe = self._reads.recipes[name]
        if recipe.converter is None and isinstance(self._source, PlacedSource):
            self._read_placed(recipe.stored[0], start, out, self._source)
        else:
            whole = self._whole(name, recipe)
            out.copy_(whole.reshape(-1)[start : start + out.numel()])

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._made = None

    def samples(self, names: Iterable[str]) -> str:
        """Return a SHA-256 of a few bytes of each stored tensor: its first, middle and last ones.

        Two checkpoints whose tensors have the same names and shapes differ in it, unless they are
        equal, or almost.
        """
        found = hashlib.sha256()
        for name in names:
            found.update(name.encode())
            found.update(self._sample(name))
        return found.hexdigest()

    def is_same(self, one: str, other: str) -> bool:
        """Whether two of the part's tensors come from the same stored one."""
        return self._reads.recipes[one] is self._reads.recipes[other]

    def equal(self, one: str, other: str, start: int, stop: int) -> bool:
        """Whether two of the part's tensors, as they are stored, have the same values in a run."""
        stored = [self._reads.recipes[name] for name in (one, other)]
        for begin in range(start, stop, _PIECE_BYTES):
            end = min(begin + _PIECE_BYTES, stop)
            pieces = []
            for name, recipe in zip((one, other), stored, strict=True):
                dtype = self._reads.stored[recipe.stored[0]].dtype
                piece = torch.empty(end - begin, dtype=dtype)
                self.read(name, begin, piece)
                pieces.append(piece)
            if not torch.equal(*pieces):
                return False
        return True

    def _sample(self, name: str) -> bytes:
        if not isinstance(self._source, PlacedSource):
            values = self._source.read(name).reshape(-1).view(torch.uint8)
            spans = _sample_spans(values.numel())
            return b"".join(bytes(values[begin:end].tolist()) for begin, end in spans)
        path, info = self._source.place(name)
        spans = _sample_spans(info.nbytes)
        return b"".join(self._bytes(path, info.start + begin, end - begin) for begin, end in spans)

    def _bytes(self, path: Path, position: int, count: int) -> bytes:
        content = bytearray(count)
        self._fill(path, position, memoryview(content))
        return bytes(content)

    def _read_placed(
        self, stored: str, start: int, out: torch.Tensor, source: PlacedSource
    ) -> None:
        """Read from a file, straight into `out` where nothing must change."""
        path, info = source.place(stored)
        dtype = self._reads.stored[stored].dtype
        _check_length(stored, path, info, (start + out.numel()) * dtype.itemsize)
        position = info.start + start * dtype.itemsize
        direct = out.dtype == dtype and out.device.type == "cpu"
        step = _PIECE_BYTES // dtype.itemsize
        buffer = None if direct else torch.empty(min(step, out.numel()), dtype=dtype)
        for begin in range(0, out.numel(), step):
            piece = out[begin : begin + step]
            target = piece if buffer is None else buffer[: piece.numel()]
            nbytes = self._fill(path, position + begin * dtype.itemsize, _memory(target))
            if buffer is not None:
                piece.copy_(target)
            self._heard(nbytes)

    def _fill(self, path: Path, position: int, memory: memoryview) -> int:
        """Read as many bytes as there is memory for."""
        if path not in self._descriptors:
            self._descriptors[path] = _opened(path)
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptors[path], [memory[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
            if not count:
                raise CheckpointError(
                    f"{path} has become shorter: nothing is there from byte {position + done} on"
                )
            done += count
        self.count.nbytes += done
        return done

    def _whole(self, name: str, recipe: Recipe) -> torch.Tensor:
        """Return a tensor that can't be read in pieces; the last that was made is kept."""
        if recipe.converter is None:
            tensor = self._source.read(recipe.stored[0])
            self._note(recipe)
            return tensor
        if self._made is None or self._made[0] is not recipe:
            self._made = None
            tensors = (self._source.read(stored) for stored in recipe.stored)
            self._made = (recipe, convert(self._model, recipe, tensors, self._source))
            self._note(recipe)
        made = self._made[1]
        return made[name] if name in made else next(iter(made.values()))

    def _note(self, recipe: Recipe) -> None:
        nbytes = sum(self._reads.stored[stored].nbytes for stored in recipe.stored)
        self.count.nbytes += nbytes
        self._heard(nbytes)


def _memory(flat: torch.Tensor) -> memoryview:
    """Return the memory of a flat tensor on the CPU."""
    return flat.view(torch.uint8).numpy().data


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} can't be opened: {error.strerror or error}") from error


def _check_length(name: str, path: Path, info: TensorInfo, needed: int) -> None:
    if needed > info.nbytes:
        raise CheckpointError(f"{path}: {name} has {info.nbytes} bytes, {needed} are needed")


def _sample_spans(nbytes: int) -> list[tuple[int, int]]:
    """Return where the samples of so many bytes lie: first, middle, last."""
    length = min(_SAMPLE_BYTES, nbytes)
    last = nbytes - length
    begins = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
    return [(begin, begin + length) for begin in begins]
