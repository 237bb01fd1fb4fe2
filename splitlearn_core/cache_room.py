"""Where all layers of a KV cache keep their keys and values: side by side, position by position.

    position 0: layer 0's key, its value, layer 1's key, ...   position 1: ...

A position that comes is written behind the others, for all layers, so that a cache is in few
pages, and in huge ones once it fills half of one (`splitlearn_core.lazy_memory`): attention reads
all of it with every token.  What a layer sees is a view, with the other layers' between two
positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from splitlearn_core.lazy_memory import LazyMemory, lazy_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPACES = (16 << 30, 1 << 30)
"""Bytes of address space that a cache has at least, so that none outgrows it that a machine could
hold many of; less where the system has no more."""

_LINE = 64
"""Bytes of a line of the processor's caches."""

_ALIASED = 4096
"""Bytes at whose multiples lines push each other out of the nearest cache."""


class FilledMemory(Protocol):
    """What a place asks of its memory."""

    @property
    def taken(self) -> int:
        """Bytes that were taken."""

    def fill(self, end: int) -> None:
        """Prepare to be written to up to byte `end`."""


class Place(NamedTuple):
    """Where a layer's keys and values go.

    Attributes:
        keys: [rows, heads, space, size].
        values: Likewise.
        memory: What they are views of, if that fills as it is needed.
        stride: Bytes there from a position to the next.
    """

    keys: torch.Tensor
    values: torch.Tensor
    memory: FilledMemory | None = None
    stride: int = 0

    def fill(self, end: int) -> None:
        """Prepare to be written to, up to position `end`."""
        if self.memory is not None:
            self.memory.fill(end * self.stride)


class _Kind(NamedTuple):
    """What the keys and values of a layer are, whatever their number of positions."""

    rows: int
    keys: tuple[int, int]
    values: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> _Kind:
        """Return that of keys and values [rows, heads, new, size]."""
        rows, heads, _, size = keys.shape
        of_values = (values.shape[1], values.shape[3])
        return cls(rows, (heads, size), of_values, keys.dtype, keys.device)

    @property
    def nbytes(self) -> int:
        """Bytes of a position in one layer."""
        return self.rows * (math.prod(self.keys) + math.prod(self.values)) * self.dtype.itemsize


class CacheRoom:
    """Gives the layers of one cache their places in memory that grows.

    All layers are alike in every architecture of transformers that was tried; one that is not like
    the first is given no place.

    Args:
        layers: How many share it.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._room: _Room | None = None

    def place(
        self, number: int, keys: torch.Tensor, values: torch.Tensor, end: int
    ) -> Place | None:
        """Return where layer `number` has space for `end` positions.

        It is another than before, and the layer copies what it has, where the space was used up or
        the number of rows has changed.

        Args:
            number: Of those that share the room.
            keys: New ones, [rows, heads, new, size].
            values: Likewise.
            end: Positions, those that it holds included.

        Returns:
            `None` where there is no such memory, or it is not for such a layer.
        """
        if keys.dtype != values.dtype:
            return None
        kind = _Kind.of(keys, values)
        room = self._room
        if room is None or kind.rows != room.kind.rows or (kind == room.kind and end > room.space):
            room = self._room = _room(self._layers, kind, end)
        if room is None or kind != room.kind:
            return None
        return room.places[number]

    def forget(self) -> None:
        """Give the memory back, once no layer has a place in it."""
        self._room = None

    def another(self, layers: int) -> CacheRoom:
        """Return an empty one of the same kind, for another cache."""
        return CacheRoom(layers)

    def __reduce__(self) -> tuple[type[CacheRoom], tuple[int]]:
        """Return what a copy is: an empty one, of the ordinary kind."""
        return CacheRoom, (self._layers,)


class _Room(NamedTuple):
    """Memory for a number of layers of one kind.

    Attributes:
        kind: What they are.
        space: Positions that there is address space for.
        places: That of each layer.
    """

    kind: _Kind
    space: int
    places: tuple[Place, ...]


def _room(layers: int, kind: _Kind, end: int) -> _Room | None:
    """Return room for `end` positions, and many more; `None` where there is no such memory."""
    stride = _stride(layers * kind.nbytes)
    for nbytes in _SPACES:
        space = max(2 * end, nbytes // stride) if stride else 0
        memory = lazy_memory(space * stride, kind.device)
        if memory is not None:
            return _Room(kind, space, tuple(_places(memory, stride, kind, layers)))
    return None


def _stride(nbytes: int) -> int:
    """Return the distance of positions of so many bytes.

    A layer's own of all positions should not lie at a few places of the processor's cache: where
    the distance would be an even number of lines, it is an odd one.
    """
    return nbytes if nbytes < _ALIASED or nbytes % (2 * _LINE) else nbytes + _LINE


def _places(memory: LazyMemory, stride: int, kind: _Kind, layers: int) -> Iterator[Place]:
    """Yield the place of each layer."""
    grid = memory.bytes.view(-1, stride).view(kind.dtype)
    space, offset = len(grid), 0
    for _ in range(layers):
        found = []
        for heads, size in (kind.keys, kind.values):
            own = grid[:, offset : offset + kind.rows * heads * size]
            found.append(own.view(space, kind.rows, heads, size).permute(1, 2, 0, 3))
            offset += kind.rows * heads * size
        yield Place(found[0], found[1], memory, stride)
