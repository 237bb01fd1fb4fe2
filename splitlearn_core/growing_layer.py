"""A layer of a KV cache that takes in positions without copying those that it has."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from splitlearn_core.cache_room import CacheRoom, Place

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 64
"""Positions by which memory grows that does not fill by itself."""


class GrowingLayer(DynamicLayer):
    """Keys and values of full attention, in memory that has room for more.

    transformers' own layer copies all that it holds with every step.  This one writes behind what
    it holds, into a room that it shares with the cache's other layers
    (`splitlearn_core.cache_room`).  It copies when the room is used up, and where it must: when
    rows were reordered, or gradients are recorded, which forbid to write into what was used before.
    Where there is no such room, it allocates block by block, and copies with each.

    `keys` and `values` [batch, heads, length, size] are views of that memory, and may be replaced
    like those of transformers' layer.
    """

    # A subclass would otherwise be registered as *the* class of its layer type, for every cache.
    _layer_type = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers' own
        self.share(CacheRoom(1), 0)

    def share(self, room: CacheRoom, number: int) -> None:
        """Keep in this room, as layer `number` of those that do, what comes from now on."""
        self._room, self._number = room, number
        self._place: Place | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values [batch, heads, new, size]; return those of all positions."""
        if torch.is_grad_enabled():
            self._place = None
            grown: tuple[torch.Tensor, torch.Tensor]
            grown = super().update(key_states, value_states, *args, **kwargs)
            return grown
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held: Any = (self.keys, self.values)
        length = held[0].shape[-2] if held[0].numel() else 0
        end = length + key_states.shape[-2]
        place = self._place_for(key_states, value_states, end)
        self.keys = _appended(place.keys, held[0], key_states, length)
        self.values = _appended(place.values, held[1], value_states, length)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all positions, and give their memory back."""
        self._place = None
        self._room.forget()
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: it has a room of its own."""
        return {**self.__dict__, "_room": CacheRoom(1), "_number": 0, "_place": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> GrowingLayer:
        """Return a copy of what it holds; a tensor alone would copy all that it is a view of."""
        other: GrowingLayer = object.__new__(type(self))
        for name, value in self.__getstate__().items():
            held = isinstance(value, torch.Tensor)
            other.__dict__[name] = value.clone() if held else copy.deepcopy(value, memo)
        return other

    def memory(self) -> dict[int, int]:
        """Return the bytes that its room takes, by the address of its storage."""
        place = self._place
        if place is None or place.memory is None:
            return {}
        pieces = [tensor.untyped_storage().data_ptr() for tensor in (place.values, place.keys)]
        return {pieces[0]: 0, pieces[1]: place.memory.taken}

    def _place_for(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> Place:
        """Return where there is space for `end` positions like these, that of before if it will do.

        Only where it will not, the room is asked: whoever outgrows it first makes a larger one.
        """
        own = self._place
        if own is None or not _holds(own, keys, end):
            own = self._room.place(self._number, keys, values, end)
            own = self._place = own or self._in_blocks(keys, values, end)
        own.fill(end)
        return own

    @staticmethod
    def _in_blocks(keys: torch.Tensor, values: torch.Tensor, end: int) -> Place:
        """Return memory for `end` positions like these."""
        space = -(-end // BLOCK) * BLOCK
        return Place(_empty(keys, space), _empty(values, space))


def share_room(layers: Iterable[Any], like: CacheRoom | None = None) -> CacheRoom:
    """Let the growing ones of these layers share a room, of the same kind as another; return it."""
    growing = [layer for layer in layers if isinstance(layer, GrowingLayer)]
    room = CacheRoom(len(growing)) if like is None else like.another(len(growing))
    for number, layer in enumerate(growing):
        layer.share(room, number)
    return room


def _empty(new: torch.Tensor, space: int) -> torch.Tensor:
    """Return memory for so many positions like those of `new`."""
    return new.new_empty(*new.shape[:2], space, new.shape[-1])


def _holds(place: Place, keys: torch.Tensor, end: int) -> bool:
    """Whether a place has space for `end` positions of as many rows as `keys`."""
    return place.keys.shape[0] == keys.shape[0] and end <= place.keys.shape[-2]


def _appended(
    room: torch.Tensor, held: torch.Tensor, new: torch.Tensor, length: int
) -> torch.Tensor:
    """Return what is held and what is new, where it has room."""
    if length and not _begins(held, room):
        same = held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
        room[..., :length, :] = held.clone() if same else held
    torch.narrow(room, 2, length, new.shape[-2]).copy_(new)
    return torch.narrow(room, 2, 0, length + new.shape[-2])


def _begins(held: torch.Tensor, room: torch.Tensor) -> bool:
    """Whether what is held lies where `room` begins, row for row."""
    return held.data_ptr() == room.data_ptr() and held.stride() == room.stride()
