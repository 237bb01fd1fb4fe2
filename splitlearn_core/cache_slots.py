"""KV caches of several sequences in memory that stays where it is, for steps at fixed addresses.

A CUDA graph reads and writes where it did when it was recorded.  So the keys and values of
sequences whose steps are one are slots of tensors that never move, of each layer two:

    [slots, heads, positions + 1, size]

A sequence has a cache like any other (`splitlearn_core.cache`), whose layers keep what they hold in
its slot, for as long as it fits there; what is done to the cache is done there.  One that gets no
slot, or outgrows it (and has it until its end), keeps it in memory of its own.

The last position of a slot is nobody's: there a row writes that has nothing to write.
"""

from __future__ import annotations

import heapq
import weakref
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from splitlearn_core.cache_room import CacheRoom, Place

if TYPE_CHECKING:
    from collections.abc import Callable


class CacheSlots:
    """Memory for the caches of so many sequences, made when the first one comes.

    Slots may be taken and given back in any thread.

    Args:
        slots: Sequences.
        positions: Most that each may have.
    """

    def __init__(self, slots: int, positions: int) -> None:
        self.positions = positions
        self._slots = slots
        self._free = list(range(slots))
        # a collection may give a slot back in the thread that is just taking one
        self._lock = RLock()
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def slot_of(self, room: CacheRoom) -> int | None:
        """Return the slot that a cache's room has here; `None` if it has none."""
        return room.slot if isinstance(room, SlotRoom) and room.slots is self else None

    def take(self) -> int | None:
        """Return the first slot that is free; `None` if none is."""
        with self._lock:
            return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int) -> None:
        """Let others have a slot."""
        with self._lock:
            heapq.heappush(self._free, slot)

    def place(
        self, slot: int, number: int, keys: torch.Tensor, values: torch.Tensor
    ) -> Place | None:
        """Return where layer `number` has its keys and values, which are like these, in a slot.

        Returns:
            `None` for one that is not like the first that was kept there.
        """
        if number not in self._layers:
            self._layers[number] = (self._empty(keys), self._empty(values))
        layer = self._layers[number]
        if not all(_alike(*pair) for pair in zip(layer, (keys, values), strict=True)):
            return None
        own = [tensor[slot : slot + 1, :, : self.positions] for tensor in layer]
        return Place(own[0], own[1], _Share(sum(tensor.nbytes for tensor in own)))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)

    def clear(self, slot: int, number: int) -> None:
        """Forget what layer `number` was left with in a slot.

        What is not looked at is multiplied by a weight of zero, which makes no number of infinity.
        """
        for tensor in self._layers.get(number, ()):
            tensor[slot].zero_()

    def views(self, slot: int, number: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `end` positions of layer `number` in a slot: keys and values."""
        keys, values = self._layers[number]
        return keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]

    def holds(self, slot: int, number: int, held: Any) -> bool:
        """Whether what a cache's layer holds, and it holds something, is that of a slot."""
        if number not in self._layers or not held.get_seq_length():
            return False
        there = self.views(slot, number, held.get_seq_length())
        return all(map(_is_same, there, (held.keys, held.values)))

    def layer(
        self, number: int, rows: int, width: int, written: torch.Tensor, length: int
    ) -> StepLayer:
        """Return layer `number` for one forward of a step of the first slots.

        Args:
            number: Of those that keep keys and values here.
            rows: Slots that are in the forward.
            width: Positions of each that are looked at.
            written: int64 [rows]: where each writes its new position.
            length: What the layer says that it holds.
        """
        keys, values = self._layers[number]
        return StepLayer(keys, values, rows, width, written, length)

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for a layer.

        A tensor like any other: those that are made in inference mode can't be written to without
        it.
        """
        _, heads, _, size = like.shape
        with torch.inference_mode(mode=False):
            return torch.zeros(
                self._slots, heads, self.positions + 1, size, dtype=like.dtype, device=like.device
            )


class _Share:
    """Stands for the memory of a place: it is there from the beginning.

    Attributes:
        taken: Its bytes.
    """

    def __init__(self, taken: int) -> None:
        self.taken = taken

    def fill(self, end: int) -> None:
        """Do nothing."""


class SlotRoom(CacheRoom):
    """Gives the layers of one cache their places in a slot, which is free again when it goes.

    Attributes:
        slots: Where slots come from.
        slot: Its own, once a layer was given a place.
    """

    def __init__(self, slots: CacheSlots, layers: int = 0) -> None:
        super().__init__(layers)
        self.slots = slots
        self._refused = False
        self._cleared: set[int] = set()
        self._end: Callable[[], Any] | None = None
        self.slot: int | None = None

    def place(
        self, number: int, keys: torch.Tensor, values: torch.Tensor, end: int
    ) -> Place | None:
        """Return where layer `number` has space; `None` for several rows, or without a slot."""
        if keys.shape[0] != 1 or end > self.slots.positions:
            return None
        if self.slot is None and not self._refused:  # one answer for all layers
            self.slot = self.slots.take()
            self._refused = self.slot is None
            if self.slot is not None:
                self._end = weakref.finalize(self, self.slots.give_back, self.slot)
        if self.slot is None:
            return None
        place = self.slots.place(self.slot, number, keys, values)
        if number not in self._cleared:
            self._cleared.add(number)
            self.slots.clear(self.slot, number)
        return place

    def forget(self) -> None:
        """Give the slot back."""
        end, self._end, self.slot, self._refused = self._end, None, None, False
        self._cleared.clear()
        if end is not None:
            end()

    def another(self, layers: int) -> SlotRoom:
        """Return the room of another cache."""
        return SlotRoom(self.slots, layers)


class StepLayer(DynamicLayer):
    """A layer of the caches of several sequences, each with one new position, at fixed addresses.

    Args:
        keys: [slots, heads, positions, size], of all slots.
        values: Likewise.
        rows: Slots, from the first, that are in the forward.
        width: Positions of each that are looked at; which of them count is for a mask to say.
        written: int64 [rows]: where each writes its new position.
        length: What the layer says that it holds.
    """

    # A subclass would otherwise be registered as *the* class of its layer type, for every cache.
    _layer_type = None

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: int,
        width: int,
        written: torch.Tensor,
        length: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self._states = (keys[:rows], values[:rows])
        self.keys, self.values = self._states
        self.is_initialized = True
        self._width = width
        self._where = (torch.arange(rows, device=keys.device), slice(None), written)
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [rows, heads, 1, size]; return those that are looked at."""
        keys, values = self._states
        keys[self._where] = key_states[:, :, 0]
        values[self._where] = value_states[:, :, 0]
        return keys[:, :, : self._width], values[:, :, : self._width]

    def get_seq_length(self) -> int:
        """Return what it was told."""
        return self._length


def _alike(layer: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a layer's memory is for such keys or values."""
    return (layer.shape[1], layer.shape[3], layer.dtype, layer.device) == (
        new.shape[1],
        new.shape[3],
        new.dtype,
        new.device,
    )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same piece of memory."""
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    )
