"""Several sequences of one part, each with a cache of its own, in one forward.

A batch of sequences of different lengths is computed as transformers computes one that is padded
on the left: the keys and values of each row are at the right end of a tensor as wide as the longest
row, and the mask hides what is left of them.  Each sequence keeps its own cache, without padding,
and its layers take in the new positions as ever; only what a layer's attention sees is joined, and
given up after the layer.  Where a part attends in place (`splitlearn_core.session_attention`), that
tensor is never made: each sequence attends to its own.  States of a fixed size (recurrent ones,
convolutions) are joined by stacking, and copied back by `commit`.

    caches = [part.new_cache(), part.new_cache()]       # filled by forwards of their own
    joined = JoinedCache(caches)
    part(torch.cat([a, b]), attention_mask=joined.mask(1), position_ids=joined.position_ids(1),
         past_key_values=joined)
    joined.commit()                                     # or: joined.roll_back()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from splitlearn_core.cache import GhostLayer, PartCache
from splitlearn_core.cache_snapshot import CacheSnapshot, copied
from splitlearn_core.growing_layer import GrowingLayer
from splitlearn_core.module_states import KEPT
from splitlearn_core.session_attention import RaggedStates, attends_in_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_core.split_model import SplitModel

_ATTENTION = {DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer}
_STATES = {
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}


_ALONE = frozenset({"git", "openai-gpt", "llama4", "llama4_text", *KEPT})
"""Types whose caches don't hold all that a sequence needs, or whose forward takes no mask with one.

`git` puts a mask for images before it; `openai-gpt` fills no cache; `llama4` may scale by the
cache's length, which is that of the longest.
"""

_UNPACKED = frozenset(
    {"axk1", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "glm4_moe_lite", "jetmoe"}
    | {"minicpm3", "moshi", "youtu"}
)
"""Types whose sequences can't be packed into one row.

`moshi` counts positions by itself; the others compute with what a cache returns before they attend
to it (latent attention above all).
"""

_LENGTH_DEPENDENT = ("longrope", "dynamic")
"""Rotary embeddings that change with the largest position of a forward."""


class Joinable(NamedTuple):
    """What sequences of a part can share.

    Attributes:
        steps: Whether steps of several sequences can be one forward.
        chunks: Whether a sequence may take in several positions where it holds some already, so
            that a long one can come in pieces.
        mask: Whether a step needs a mask: where no layer looks back at single positions, it takes
            none, as in transformers' own generation.
        packed: Whether steps and pieces of any lengths can be one forward
            (`splitlearn_core.packed_cache`).
    """

    steps: bool
    chunks: bool
    mask: bool
    packed: bool = False


def joinable(part: SplitModel) -> Joinable:
    """Return what sequences of a part can share: it depends on what its layers keep."""
    if part.drops_positions or part.config.model_type in _ALONE:
        return Joinable(steps=False, chunks=False, mask=True)
    cache = joinable_cache(part)
    if not cache.counts_positions or _depends_on_length(part.config.to_dict()):
        return Joinable(steps=False, chunks=False, mask=True)
    kinds = {type(layer) for layer in cache.layers if not isinstance(layer, GhostLayer)}
    looks_back = any(isinstance(layer, DynamicLayer) for layer in cache.layers)
    attention = kinds <= _ATTENTION
    packed = attention and attends_in_place(part) and _packs(part)
    return Joinable(kinds <= _ATTENTION | _STATES, attention, looks_back, packed)


def _packs(part: SplitModel) -> bool:
    """Whether sequences in one row would get what they get alone: none looks ahead."""
    causal = all(getattr(module, "is_causal", True) for module in part.modules())
    return causal and part.config.model_type not in _UNPACKED


def takes_chunks(part: SplitModel) -> bool:
    """Whether a long sequence of the whole model may come in pieces, whichever part takes them.

    `joinable` says it of a part's own layers; other parts of the same model may have others.
    """
    if part.drops_positions or part.config.model_type in _ALONE:
        return False
    layers = DynamicCache(config=part.config).layers
    return {type(layer) for layer in layers} <= _ATTENTION


def joinable_cache(part: SplitModel) -> PartCache:
    """Return an empty cache that can be joined with others of the same part.

    That of `new_cache`, but for the whole model, whose own is transformers' and copies all that it
    holds with every step.
    """
    return PartCache(part.config, part.spec)


def _depends_on_length(config: Any) -> bool:
    """Whether a config, or what is in it, has rotary embeddings of such a kind."""
    if isinstance(config, dict):
        kind = config.get("rope_type", config.get("type"))
        if isinstance(kind, str) and any(name in kind for name in _LENGTH_DEPENDENT):
            return True
        return any(map(_depends_on_length, config.values()))
    return isinstance(config, list) and any(map(_depends_on_length, config))


class _Member(NamedTuple):
    """A layer of one sequence's cache, and its rows in the batch."""

    layer: Any
    rows: slice


class JoinedCache(PartCache):
    """The caches of several sequences as the cache of one batch, for one forward.

    Args:
        caches: Made by the same part's `new_cache()`, each filled by at least one forward.
        in_place: Whether the part attends in place.

    Attributes:
        lengths: Positions that each cache held before.
        longest: The most of them.

    Raises:
        ValueError: There is none, one is empty, or they are of different parts.
    """

    def __init__(self, caches: Sequence[PartCache], *, in_place: bool = False) -> None:
        if not caches or len({cache.spec for cache in caches}) > 1:
            raise ValueError("one or more caches of the same part are joined")
        if empty := [str(n) for n, cache in enumerate(caches) if not cache.rows]:
            raise ValueError(f"a cache that is joined holds something; empty: {', '.join(empty)}")
        self.caches = tuple(caches)
        self.spec = caches[0].spec
        self.lengths = [cache.length for cache in caches]
        self.longest = max(self.lengths)
        self._row_counts = [cache.rows for cache in caches]
        self._slices = _slices(self._row_counts)
        self._before = CacheSnapshot(caches)
        room = None if in_place else _Room()
        Cache.__init__(self, layers=[self._join(n, room) for n in range(len(caches[0].layers))])

    def rows_of(self, number: int) -> slice:
        """Return which rows of the batch are those of cache `number`."""
        return self._slices[number]

    def mask(self, new: int, masks: Sequence[torch.Tensor | None] = ()) -> torch.Tensor | None:
        """Return the attention mask of a forward that adds `new` positions to each row.

        Args:
            new: Positions.
            masks: For each cache its own mask [rows, length + new], 0 for padding; `None` (or no
                such argument at all) where there is no padding.

        Returns:
            int64 [all rows, longest + new], or `None` where every row is as long as the others,
            and none is padded.
        """
        own = masks or [None] * len(self.caches)
        if len(set(self.lengths)) == 1 and all(mask is None for mask in own):
            return None
        joined = torch.zeros(sum(self._row_counts), self.longest + new, dtype=torch.int64)
        for rows, length, mask in zip(self._slices, self.lengths, own, strict=True):
            joined[rows, self.longest - length :] = 1 if mask is None else mask
        return joined

    def position_ids(self, new: int) -> torch.Tensor:
        """Return the ids of the `new` positions of each row, counted from its own first one.

        Returns:
            int64 [all rows, new].
        """
        starts = torch.tensor(self.lengths).repeat_interleave(torch.tensor(self._row_counts))
        return starts[:, None] + torch.arange(new)

    def commit(self) -> None:
        """Take what the forward computed into every cache."""
        for joined in self.layers:
            if isinstance(joined, JoinedStates):
                joined.scatter()
        for cache in self.caches:
            cache.advance_ghosts(self.length - self.longest)

    def roll_back(self) -> None:
        """Let every cache be what it was before the forward, which may have failed half-way."""
        self._before.restore()

    def _join(self, number: int, room: _Room | None) -> Any:
        """Return the layer `number` of the batch."""
        own = [cache.layers[number] for cache in self.caches]
        if isinstance(own[0], GhostLayer):
            return own[0].at(self.longest)
        members = [_Member(layer, rows) for layer, rows in zip(own, self._slices, strict=True)]
        return _joined_layer(members, self.longest, room)


class _Room:
    """Memory for the joined keys and values of one layer, used again by the next.

    A layer is done with what it was given before the next one begins.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}

    def take(self, like: torch.Tensor, shape: tuple[int, ...], use: str) -> torch.Tensor:
        """Return a tensor of this shape, with anything in it."""
        key = (shape, like.dtype, like.device, use)
        if key not in self._tensors:
            self._tensors[key] = like.new_empty(shape)
        return self._tensors[key]


class JoinedLayer:
    """Mixed into the class of a cache layer: what all of them have when they are joined."""

    # A subclass would otherwise be registered as *the* class of its layer type, for every cache.
    _layer_type = None
    members: list[_Member]


class JoinedAttention(JoinedLayer):
    """Keys and values of several sequences, each row as long as its sequence."""

    length: int
    room: _Room | None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let each sequence take in its rows; return what their attention sees, padded."""
        seen = [
            member.layer.update(keys[member.rows], values[member.rows], *args, **kwargs)
            for member in self.members
        ]
        self.length += keys.shape[-2]
        self.cumulative_length = self.length
        own_keys, own_values = zip(*seen, strict=True)
        if self.room is None:
            slices = [member.rows for member in self.members]
            return RaggedStates(own_keys, slices), RaggedStates(own_values, slices)
        return (
            self._padded(self.room, own_keys, keys.shape[0], "keys"),
            self._padded(self.room, own_values, keys.shape[0], "values"),
        )

    def get_seq_length(self) -> int:
        """Return the length of the longest row."""
        return self.length

    def _padded(
        self, room: _Room, pieces: Sequence[torch.Tensor], rows: int, use: str
    ) -> torch.Tensor:
        """Return tensors [rows, heads, length, size] as one, each at the right end.

        What is left of one is zero, not anything: a weight of zero times infinity is no number.
        """
        width = max(piece.shape[-2] for piece in pieces)
        _, heads, _, size = pieces[0].shape
        joined = room.take(pieces[0], (rows, heads, width, size), use)
        for piece, member in zip(pieces, self.members, strict=True):
            left = width - piece.shape[-2]
            own = joined[member.rows]
            own[:, :, left:].copy_(piece)
            if left:
                own[:, :, :left].zero_()
        return joined


class JoinedStates(JoinedLayer):
    """States of a fixed size, of several sequences."""

    conv_states: dict[int, torch.Tensor | None]
    recurrent_states: dict[int, torch.Tensor | None]

    def gather(self) -> None:
        """Stack the sequences' states."""
        for kind in ("conv_states", "recurrent_states"):
            own = [getattr(member.layer, kind) for member in self.members]
            joined = {number: _stacked([states[number] for states in own]) for number in own[0]}
            setattr(self, kind, joined)

    def scatter(self) -> None:
        """Give each sequence its own; what they had stays as it was, for whoever goes back."""
        for kind in ("conv_states", "recurrent_states"):
            for number, joined in getattr(self, kind).items():
                for layer, rows in self.members:
                    if joined is not None:
                        getattr(layer, kind)[number] = joined[rows].clone()


_JOINED: dict[type[Any], type[Any]] = {}


def _joined_layer(members: list[_Member], longest: int, room: _Room | None) -> Any:
    """Return one layer that stands for those of several sequences."""
    real = members[0].layer
    layer: Any = object.__new__(_joined_class(type(real)))
    layer.__dict__.update(copied(real), members=members, length=longest, room=room)
    if hasattr(real, "cumulative_length"):  # sliding windows
        layer.cumulative_length = longest
    if isinstance(layer, JoinedStates):
        layer.gather()
    return layer


def _joined_class(real: type[Any]) -> type[Any]:
    """Return the joined class of a class of cache layers, the same one each time."""
    if real not in _JOINED:
        mixed: list[type[Any]] = [JoinedAttention] if issubclass(real, DynamicLayer) else []
        mixed += [JoinedStates] if issubclass(real, LinearAttentionCacheLayerMixin) else []
        _JOINED[real] = type(f"Joined{real.__name__}", (*mixed, real), {"_layer_type": None})
    return _JOINED[real]


def _stacked(states: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return states as one; a kind that the architecture does not have is `None` in all."""
    there = [state for state in states if state is not None]
    return torch.cat(there) if there else None


def _slices(counts: Sequence[int]) -> list[slice]:
    """Return which rows belong to each, one after the other."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
