"""A layer of a KV cache that takes in positions without copying those that it has."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from splitlearn_core.lazy_memory import PAGE, lazy_empty

BLOCK = 64
"""Positions by which the memory grows."""

_SHORTEST_LAZY = 512
"""Positions that there is at least address space for."""


class GrowingLayer(DynamicLayer):
    """Keys and values of full attention, in memory that has room for at most `BLOCK` more.

    transformers' own layer copies all that it holds with every step.  This one has address space
    for up to twice as many positions as it holds, and memory for those that it holds, rounded up to
    pages (`splitlearn_core.lazy_memory`).  It copies when that is used up, and where it must: when
    rows were reordered, or gradients are recorded, which forbid to write into what was used before.
    Where there is no such memory, or a block of a head is smaller than a page, it allocates block
    by block, and copies with each.

    `keys` and `values` [batch, heads, length, size] are views of that memory, and may be replaced
    like those of transformers' layer.
    """

    # A subclass would otherwise be registered as *the* class of its layer type, for every cache.
    _layer_type = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers' own
        self._rooms: dict[str, torch.Tensor] = {}
        self._filled: dict[str, int] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values [batch, heads, new, size]; return those of all positions."""
        if torch.is_grad_enabled():
            self._rooms.clear()
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all positions, and give their memory back."""
        self._rooms.clear()
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: it has room of its own, when it needs some."""
        return {**self.__dict__, "_rooms": {}}

    def memory(self) -> dict[int, int]:
        """Return the bytes that each of its rooms takes, by the address of its storage.

        Whole blocks of the most positions that were ever in it: what is beyond takes no memory.
        """
        return {
            room.untyped_storage().data_ptr(): room[..., :1, :].nbytes
            * min(_in_blocks(self._filled[name]), room.shape[-2])
            for name, room in tuple(self._rooms.items())
        }

    def _append(self, name: str, held: Any, new: torch.Tensor) -> torch.Tensor:
        """Return what is held and what is new, in the same memory if that has room."""
        length = held.shape[-2] if held.numel() else 0
        end = length + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or end > room.shape[-2] or not _begins(held, room, new):
            room = _room(new, end)
            if length:
                room[..., :length, :] = held
            self._filled[name] = 0
            self._rooms[name] = room
        room[..., length:end, :] = new
        self._filled[name] = max(self._filled[name], end)
        return room[..., :end, :]


def _room(new: torch.Tensor, end: int) -> torch.Tensor:
    """Return memory for `end` positions like those of `new`."""
    *rows, _, size = new.shape
    if BLOCK * size * new.element_size() >= PAGE:
        space = max(1 << (2 * end - 1).bit_length(), _SHORTEST_LAZY)
        lazy = lazy_empty((*rows, space, size), new)
        if lazy is not None:
            return lazy
    return new.new_empty(*rows, _in_blocks(end), size)


def _in_blocks(positions: int) -> int:
    """Return how many positions whole blocks have."""
    return -(-positions // BLOCK) * BLOCK


def _begins(held: torch.Tensor, room: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether what is held lies where `room` begins, row for row."""
    if not held.numel():
        return room.shape[0] == new.shape[0]
    return (
        held.data_ptr() == room.data_ptr()
        and held.shape[:-2] == room.shape[:-2]
        and held.stride() == room.stride()
    )
