"""Several sequences of one part in one forward, each with as many new positions as it likes.

Their new positions are packed: one behind the other, as a single row.  All that a layer computes
for each position by itself it computes for all of them at once, and reads its weights once.  Each
sequence's keys and values go into its own cache, and its positions attend to those alone, so that
nothing is padded: steps of one token and pieces of prompts can be in the same forward.

    caches = [part.new_cache(), part.new_cache()]
    packed = PackedCache(caches, [(1, 5), (1, 1)])      # rows and new positions of each
    output = part(packed.pack([a, b]).handed_on, attention_mask=packed.mask,
                  position_ids=packed.position_ids(), past_key_values=packed)
    packed.commit()                                     # or: packed.roll_back()
    first, second = packed.unpack(HiddenState.of(output))

It takes a part that attends in place (`splitlearn_core.session_attention`) and whose layers keep
nothing but keys and values: `joinable(part).packed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from splitlearn_core.cache import GhostLayer, PartCache
from splitlearn_core.cache_snapshot import CacheSnapshot
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.session_attention import PackedStates, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence


class PackedCache(PartCache):
    """The caches of several sequences as the cache of one row, for one forward.

    Args:
        caches: Made by the same part's `new_cache()`; they may be empty.
        sizes: Of each, its rows and its new positions.

    Attributes:
        mask: What a forward is given as its attention mask: nothing is in it, and transformers
            hands it on as it is.
        lengths: Positions that each cache held before.

    Raises:
        ValueError: There is none, or they are of different parts.
    """

    def __init__(self, caches: Sequence[PartCache], sizes: Sequence[tuple[int, int]]) -> None:
        if not caches or len({cache.spec for cache in caches}) > 1:
            raise ValueError("one or more caches of the same part are packed")
        self.spec = caches[0].spec
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self.lengths = [cache.length for cache in caches]
        self._caches = tuple(caches)
        self._segments = _segments(sizes)
        self._before = CacheSnapshot(caches)
        longest = max(self.lengths)
        masks: dict[tuple[int, ...], torch.Tensor] = {}
        layers: list[Any] = [
            own[0].at(longest)
            if isinstance(own[0], GhostLayer)
            else _packed_layer(own, self._segments, masks, longest)
            for own in zip(*(cache.layers for cache in caches), strict=True)
        ]
        Cache.__init__(self, layers=layers)

    def position_ids(self) -> torch.Tensor:
        """Return the ids of all new positions, counted from each sequence's own first one.

        Returns:
            int64 [1, all new].
        """
        counted = [
            torch.arange(length, length + segment.new).repeat(segment.rows)
            for length, segment in zip(self.lengths, self._segments, strict=True)
        ]
        return torch.cat(counted)[None]

    def pack(self, given: Sequence[HiddenState]) -> HiddenState:
        """Return what the sequences bring, [rows, new, …] each, as one row."""
        return HiddenState.joined([one.flat() for one in given], dim=1)

    def unpack(self, output: HiddenState) -> list[HiddenState]:
        """Return what a forward gave for each sequence, [rows, new, …]."""
        return [
            output.between(segment.start, segment.stop).unflat(segment.rows)
            for segment in self._segments
        ]

    def commit(self) -> None:
        """Take what the forward computed into every cache."""
        for cache, segment in zip(self._caches, self._segments, strict=True):
            cache.advance_ghosts(segment.new)

    def roll_back(self) -> None:
        """Let every cache be what it was before the forward, which may have failed half-way."""
        self._before.restore()


class PackedAttention:
    """Mixed into the class of a cache layer: keys and values of several sequences."""

    # A subclass would otherwise be registered as *the* class of its layer type, for every cache.
    _layer_type = None
    members: Sequence[Any]
    segments: Sequence[Segment]
    masks: dict[tuple[int, ...], torch.Tensor]
    length: int

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let each sequence take in its positions; return what each attends to."""
        counts = [segment.positions for segment in self.segments]
        new = zip(torch.split(keys, counts, 2), torch.split(values, counts, 2), strict=True)
        seen = [
            layer.update(segment.unflat(key), segment.unflat(value), *args, **kwargs)
            for layer, segment, (key, value) in zip(self.members, self.segments, new, strict=True)
        ]
        window: int | None = getattr(self, "sliding_window", None)
        own_keys, own_values = zip(*seen, strict=True)
        return (
            PackedStates(own_keys, self.segments, window, self.masks),
            PackedStates(own_values, self.segments, window, self.masks),
        )

    def get_seq_length(self) -> int:
        """Return the length of the longest sequence before the forward."""
        return self.length


def _segments(sizes: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """Return where in the row each sequence is."""
    found: list[Segment] = []
    start = 0
    for rows, new in sizes:
        found.append(Segment(rows, new, start))
        start += rows * new
    return tuple(found)


_PACKED: dict[type[Any], type[Any]] = {}


def _packed_layer(
    members: Sequence[Any],
    segments: Sequence[Segment],
    masks: dict[tuple[int, ...], torch.Tensor],
    longest: int,
) -> Any:
    """Return one layer that stands for those of several sequences."""
    real = type(members[0])
    if real not in _PACKED:
        mixed = (PackedAttention, real)
        _PACKED[real] = type(f"Packed{real.__name__}", mixed, {"_layer_type": None})
    layer: Any = object.__new__(_PACKED[real])
    layer.__dict__.update(
        vars(members[0]), members=members, segments=segments, masks=masks, length=longest
    )
    return layer
