"""KV caches of parts.

Hugging Face's forward asks a cache for masks and positions by layer number, often of layer 0.
A part's cache therefore has a slot for every layer of the model: real ones for the layers that the
part owns, and ghosts elsewhere, which hold no data and only count positions.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from splitlearn_core.errors import CacheMismatchError
from splitlearn_core.growing_layer import GrowingLayer, share_room

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedConfig

    from splitlearn_core.cache_room import CacheRoom
    from splitlearn_core.plan import ComponentSpec


class GhostLayer:
    """Mixed into the class of a cache layer whose model layer another part owns.

    It counts positions and holds none; what it is asked (lengths, mask sizes, whether there is a
    recurrent state) it answers as the real one would.
    """

    # A subclass would otherwise be registered as *the* class of its layer type, for every cache.
    _layer_type = None
    length: int

    def advance(self, positions: int) -> None:
        """Count `positions` more."""
        self._count(self.length + positions)

    def at(self, length: int) -> GhostLayer:
        """Return another that stands at `length` positions."""
        other: GhostLayer = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._count(length)
        return other

    def get_seq_length(self) -> int:
        """Return how many positions went through."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (a negative number, as in transformers)."""
        self._count(max(0, self.length + min(tokens_to_remove, 0)))

    def reset(self) -> None:
        """Forget all positions."""
        self._count(0)

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: an absent layer has nothing to store."""
        raise RuntimeError("a layer that this part does not own was asked to store its state")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Do nothing: there are no rows."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing: there are no rows."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Do nothing: there are no rows."""

    def offload(self) -> None:
        """Do nothing: there is nothing to move."""

    def prefetch(self) -> None:
        """Do nothing: there is nothing to move."""

    def _count(self, length: int) -> None:
        """Set the length, under every name that the real layer has for it."""
        self.length = length
        if hasattr(self, "cumulative_length"):  # sliding windows
            self.cumulative_length = length
        states: dict[int, bool] | None = getattr(self, "has_previous_state", None)
        if states is not None:  # recurrent states
            self.has_previous_state = dict.fromkeys(states, length > 0)


_GHOSTS: dict[type[Any], type[Any]] = {}


def _ghost_class(real: type[Any]) -> type[Any]:
    """Return the ghost of a class of cache layers, the same one each time."""
    if real not in _GHOSTS:
        _GHOSTS[real] = type(f"Ghost{real.__name__}", (GhostLayer, real), {"_layer_type": None})
    return _GHOSTS[real]


def _ghost_of(layer: Any) -> GhostLayer:
    """Return the ghost that answers as `layer`, which is empty, would."""
    ghost: GhostLayer = object.__new__(_ghost_class(type(layer)))
    ghost.__dict__.update(layer.__dict__)
    ghost.length = 0
    return ghost


class PartCache(DynamicCache):
    """The cache of one part; made by `SplitModel.new_cache()`, filled in place by its forward.

    Args:
        config: The whole model's.
        spec: The layers of the part.
        room: Its layers have one of the same kind.

    Attributes:
        room: Where layers of full attention keep what they hold.
    """

    def __init__(
        self, config: PreTrainedConfig, spec: ComponentSpec, room: CacheRoom | None = None
    ) -> None:
        super().__init__(config=config)
        self.spec = spec
        self._config = config
        self._shared: dict[str, int] = {}
        self._records_past = False
        self.module_states: tuple[Any, ...] = ()  # see `module_states.py`
        owned = range(spec.start_layer, spec.end_layer)
        self.layers = [
            _growing(layer) if number in owned else _ghost_of(layer)  # type: ignore[misc]  # mixed in
            for number, layer in enumerate(self.layers)
        ]
        self.room = share_room(self.layers, room)

    @property
    def counts_positions(self) -> bool:
        """Whether `length` can be told: a whole model of recurrent layers alone counts none."""
        return self._counter is not None

    @property
    def length(self) -> int:
        """Positions that it holds.

        Raises:
            ValueError: No layer counts them.
        """
        counter = self._counter
        if counter is None:
            raise ValueError("no layer of this cache counts positions: all of them are recurrent")
        return int(counter.get_seq_length())

    @property
    def _counter(self) -> Any:
        """The first layer that counts positions, a ghost where there is one; `None` for none."""
        attention = (layer for layer in self.layers if isinstance(layer, DynamicLayer))
        ghosts = (layer for layer in self.layers if isinstance(layer, GhostLayer))
        return next(ghosts, None) or next(attention, None)

    @property
    def rows(self) -> int:
        """Rows that it holds; 0 while it is empty."""
        return next(
            (tensor.shape[0] for tensor in self._held() if tensor.ndim and tensor.numel()), 0
        )

    def copy(self) -> PartCache:
        """Return another cache that holds the same, in memory of its own."""
        other: PartCache = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _shared=dict(self._shared))
        other.layers = [_copy_of(layer) for layer in self.layers]
        other.room = share_room(other.layers, self.room)
        other.module_states = tuple(map(_copied, self.module_states))
        return other

    def advance_ghosts(self, positions: int) -> None:
        """Count `positions` that a forward has just put through the layers that are here."""
        for layer in self.layers:
            if isinstance(layer, GhostLayer):
                layer.advance(positions)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]  # transformers
        self.module_states = ()

    @property
    def shared_layers(self) -> list[Any]:
        """The slots after those of the model's layers, see `extend_shared`."""
        return [self.layers[slot] for slot in self._shared.values()]

    def extend_shared(
        self, kind: str, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what another part's layer computed that layers here share, and return all of it.

        It has a slot of its own after those of the model's layers, so that whatever is done to the
        cache's rows and positions is done to it as well.

        Args:
            kind: Which layers share it: their type, as the config has it.
            keys: Those of the new positions, [batch, heads, new, size].
            values: Likewise.

        Returns:
            Keys and values as such a layer would have been given them.
        """
        if kind not in self._shared:
            types = self._config.get_text_config(decoder=True).layer_types
            self._shared[kind] = len(self.layers)
            self.layers.append(DynamicCache(config=self._config).layers[types.index(kind)])
            if self._records_past:
                super().activate_past_recording()  # type: ignore[no-untyped-call]  # transformers
        return self.update(keys, values, self._shared[kind])

    def activate_past_recording(self) -> None:
        """Let sliding and convolution layers keep what `crop` may need, until it is called."""
        self._records_past = True
        super().activate_past_recording()  # type: ignore[no-untyped-call]  # transformers

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let the rows be those that are named."""
        super().reorder_cache(beam_idx)
        self.module_states = tuple(
            None if state is None else state.index_select(0, beam_idx.to(state.device))
            for state in self.module_states
        )

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the part's own layers back as they were."""
        return not self.module_states and all(
            layer.is_croppable for layer in self.layers if not isinstance(layer, GhostLayer)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the states of the part's own layers take."""
        return sum(tensor.nbytes for tensor in self._held())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the memory that they lie in, which has room for some positions more."""
        memory = [tensor.untyped_storage() for tensor in self._held()]
        taken = {piece.data_ptr(): piece.nbytes() for piece in memory}
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                taken.update(layer.memory())
        return sum(taken.values())

    def _held(self) -> Iterator[torch.Tensor]:
        """Yield the tensors of the part's own layers."""
        for layer in self.layers:
            yield from _tensors(layer.__getstate__())
        yield from _tensors(self.module_states)


def _growing(layer: Any) -> Any:
    """Return a layer of full attention that grows in place, instead of transformers' own."""
    return GrowingLayer() if type(layer) is DynamicLayer else layer


def _copy_of(layer: Any) -> Any:
    """Return a layer that holds the same, in memory of its own."""
    other = object.__new__(type(layer))
    held: dict[str, Any] = layer.__getstate__()
    other.__dict__.update({name: _copied(value) for name, value in held.items()})
    return other


def _copied(value: Any) -> Any:
    """Return tensors, and those in a dict, in memory of their own; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class ChainCache(Cache):
    """The cache of a chain of parts: one cache for each, in the order of the layers.

    A part that is elsewhere has a cache there; what stands for it here need only have
    `get_seq_length`.  What is done to this object is done to every part's; what it is asked of a
    layer, the layer's own part answers, or a ghost where that is elsewhere.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self.parts = tuple(parts)
        self._uneven = False
        super().__init__(layers=[])

    @property
    def layers(self) -> list[Any]:
        """The model's layers, then what parts keep of keys and values that layers share."""
        caches = [part for part in self.parts if isinstance(part, PartCache)]
        if not caches:
            return []
        layers = list(caches[0].layers)
        for cache in caches:
            own = range(cache.spec.start_layer, cache.spec.end_layer)
            layers[own.start : own.stop] = cache.layers[own.start : own.stop]
        return layers + [layer for cache in caches for layer in cache.shared_layers]

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        """Leave them as they are: they are the parts'.  transformers sets them when it begins."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Fill, or change, every part's cache within the block.

        If that fails, some parts have the new positions and others have not; from then on the
        cache can only be `reset`.

        Raises:
            CacheMismatchError: An earlier step failed.
        """
        self._refuse_if_uneven()
        self._uneven = True
        yield
        self._uneven = False

    def _refuse_if_uneven(self) -> None:
        """Raise if a step failed half-way."""
        if self._uneven:
            raise CacheMismatchError(
                "a step with this cache failed half-way, so that its parts hold different"
                " positions; begin again with new_cache()"
            )

    @property
    def is_compileable(self) -> bool:
        """No: the parts' caches grow."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put every part's cache back as it was."""
        return all(getattr(part, "is_croppable", False) for part in self.parts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions are held; the same in every part.

        Raises:
            ValueError: No layer counts positions: all of them are recurrent.
        """
        return int(self.parts[0].get_seq_length(layer_idx))

    def activate_past_recording(self) -> None:
        """Let every part keep what `crop` may need, until it is called."""
        self._each("activate_past_recording")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions in every part (0 or less).

        Raises:
            ValueError: It is more than 0.
            RuntimeError: A layer no longer has the positions before them (`activate_past_recording`
                before the first step makes it keep them).
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, that of the positions to forget; found"
                f" {tokens_to_remove}"
            )
        self._each("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows in every part (beam search)."""
        self._each("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row in every part."""
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows in every part."""
        self._each("batch_select_indices", indices)

    def reset(self) -> None:
        """Forget everything in every part."""
        calls = self._calls("reset")
        self._uneven = False
        self._run(calls)

    def copy(self) -> ChainCache:
        """Return another cache that holds the same in every part, and goes its own way.

        Raises:
            CacheMismatchError: An earlier step failed.
            NotImplementedError: A part that is elsewhere can't copy its cache.
        """
        self._refuse_if_uneven()
        return type(self)(call() for call in self._calls("copy"))

    def close(self) -> None:
        """End the sessions of parts that are elsewhere."""
        for part in self.parts:
            close = getattr(part, "close", None)
            if close is not None:
                close()

    def _each(self, method: str, *args: Any) -> None:
        """Call `method` of every part's cache, having checked that all of them have it."""
        self._run(self._calls(method), *args)

    def _calls(self, method: str) -> list[Any]:
        """Return `method` of every part's cache.

        Raises:
            NotImplementedError: One of them has none.
        """
        calls = [getattr(part, method, None) for part in self.parts]
        for part, call in zip(self.parts, calls, strict=True):
            if call is None:
                raise NotImplementedError(
                    f"a {type(part).__name__} can't do {method}: with a part that is elsewhere,"
                    " generate without beams, assistant_model and prompt_lookup_num_tokens"
                )
        return calls

    def _run(self, calls: Iterable[Any], *args: Any) -> None:
        with self.step():
            for call in calls:
                call(*args)
