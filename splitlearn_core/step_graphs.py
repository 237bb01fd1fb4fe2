"""Decode steps of a part as CUDA graphs: all kernels of a step are launched at once.

A step of one token is some dozen small kernels for each layer, and to launch them one by one takes
a GPU's host longer than the GPU needs.  A graph is recorded once, and launched as one
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).  It computes what was recorded,
at the same addresses, with the same shapes: so caches of sequences that step in graphs lie in slots
(`splitlearn_core.cache_slots`), and there is a graph for each number of slots and of positions that
are looked at, both rounded up to a power of two, recorded when it is first needed.

    graphs = StepGraphs(trunk, sequences=16, positions=4096)
    caches = [graphs.new_cache(), graphs.new_cache()]   # filled by forwards of their own
    hidden = graphs.step(caches, hidden)                # [2, 1, hidden] -> [2, 1, hidden]

What is computed is what transformers' own forward computes for a padded batch of all slots, with a
mask that hides what is not a sequence's own.  Where there is no CUDA, that forward is run as it is:
that way it is tested.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.cache_utils import Cache

from splitlearn_core.cache import GhostLayer, PartCache
from splitlearn_core.cache_slots import CacheSlots, SlotRoom
from splitlearn_core.errors import StepGraphError
from splitlearn_core.graph_recorder import GraphRecorder
from splitlearn_core.growing_layer import GrowingLayer
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import joinable
from splitlearn_core.messages import in_one_line
from splitlearn_core.transfers import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_core.split_model import SplitModel

_NARROWEST = 128
"""Positions that are looked at, at least."""

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error of the first step, by the dtype of the hidden state."""

_TEST_LENGTHS = (5, 3)


class StepGraphs:
    """Runs steps of one token of several sequences of a part, each in one launch.

    A part's forwards, these among them, run in one thread at a time.

    Args:
        part: A Trunk, all of whose layers keep the keys and values of all positions and nothing
            else, and which needs nothing but the hidden state.
        sequences: Most that have a slot at once.
        positions: Most that a sequence in a slot may have.

    Raises:
        StepGraphError: (a `ValueError`) The part is another, or a first step did not give what
            its forward gives.
    """

    def __init__(self, part: SplitModel, sequences: int, positions: int) -> None:
        if sequences < 1 or positions < 1:
            raise StepGraphError(
                f"CUDA graphs are for 1 or more sequences and positions, found {sequences} and"
                f" {positions}"
            )
        self._part_seen = weakref.ref(part)  # a part has its graphs: its memory goes with it
        self._sequences = sequences
        self._slots = CacheSlots(sequences, positions)
        self._steps: dict[tuple[int, int], _Step] = {}
        self._recorder = GraphRecorder(part.device) if part.device.type == "cuda" else None
        self._failed = False
        _check_part(part)
        self._check_first_step()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that caches lie in."""
        return self._slots.nbytes

    @property
    def _part(self) -> SplitModel:
        """The part."""
        return _there(self._part_seen)

    def new_cache(self) -> PartCache:
        """Return an empty cache of the part that gets a slot, if one is free when it is filled."""
        return PartCache(self._part.config, self._part.spec, SlotRoom(self._slots))

    def takes(self, cache: Any) -> bool:
        """Whether a step with this cache can be here: all that it holds, for one row, is in a slot.

        And there is room for one position more, and no graph could not be recorded before.
        """
        slot = self._slots.slot_of(cache.room) if isinstance(cache, PartCache) else None
        if slot is None or self._failed or cache.length >= self._slots.positions:
            return False
        own = enumerate(_growing(cache))
        return all(self._slots.holds(slot, number, layer) for number, layer in own)

    def step(
        self,
        caches: Sequence[PartCache],
        hidden: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take one position more into each of these caches; if it fails, they are as they were.

        Args:
            caches: All such as it `takes`, each once.
            hidden: [sequences, 1, *hidden_shape], on any device.
            positions: int64 [sequences, 1]: their position ids; counted from each cache's length
                when left out.

        Returns:
            What the part gives, [sequences, 1, *hidden_shape].
        """
        lengths = [cache.length for cache in caches]
        slots = [self._slot(cache) for cache in caches]
        said = lengths if positions is None else positions.flatten().tolist()
        with torch.inference_mode():
            rows = min(_power(max(slots) + 1), self._sequences)
            width = min(max(_power(max(lengths) + 1), _NARROWEST), self._slots.positions)
            output = self._step_of(rows, width).run(slots, lengths, said, hidden)
        for cache, slot, length in zip(caches, slots, lengths, strict=True):
            for number, layer in enumerate(_growing(cache)):
                layer.keys, layer.values = self._slots.views(slot, number, length + 1)
            cache.advance_ghosts(1)
        return output

    def _slot(self, cache: PartCache) -> int:
        slot = self._slots.slot_of(cache.room)
        if slot is None:
            raise ValueError("a cache that steps in a graph has a slot: see `takes`")
        return slot

    def _step_of(self, rows: int, width: int) -> _Step:
        """Return the step of so many slots and positions.

        Where one can't be recorded, no other is tried: nothing is said of what CUDA is left with.
        """
        if (rows, width) not in self._steps:
            try:
                step = _Step(self._part, self._slots, rows, width, self._recorder)
            except Exception:
                self._failed = True
                raise
            self._steps[rows, width] = step
        return self._steps[rows, width]

    def _check_first_step(self) -> None:
        """Compare a step with the part's own forward."""
        part = self._part
        numbers = torch.Generator().manual_seed(0)
        rows = len(_TEST_LENGTHS[: self._sequences])
        given = [
            torch.randn(1, length + 1, *part.hidden_shape, generator=numbers).to(part.hidden_dtype)
            for length in _TEST_LENGTHS[:rows]
        ]
        longest = max(_TEST_LENGTHS) + 1
        if self._slots.positions < longest:
            raise StepGraphError(f"CUDA graphs are for {longest} positions or more")
        try:
            found, wanted = self._first_steps(given)
        except Exception as error:
            raise StepGraphError(f"{_unfit(part)}: {in_one_line(_first_of(error))}") from error
        difference = float((found - wanted).norm() / wanted.norm())
        if not difference <= _TOLERANCES.get(part.hidden_dtype, _TOLERANCES[torch.float32]):
            raise StepGraphError(f"{_unfit(part)}: a first step differs by {difference:.2g}")

    def _first_steps(self, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what steps give here, and what the part's own forward gives; float64."""
        part = self._part
        caches = [self.new_cache() for _ in given]
        wanted = []
        with torch.inference_mode():
            for cache, hidden in zip(caches, given, strict=True):
                alone = PartCache(part.config, part.spec)
                for own in (cache, alone):
                    part(hidden[:, :-1], past_key_values=own)
                wanted.append(HiddenState.of(part(hidden[:, -1:], past_key_values=alone)).tensor)
            if not all(map(self.takes, caches)):
                raise ValueError("its cache does not keep to its slot")
            found = self.step(caches, torch.cat([hidden[:, -1:] for hidden in given]))
        for cache in caches:
            cache.reset()
        return found.double(), torch.cat(wanted).double()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return nothing: graphs are of one part's weights, and a copy has others."""

    def __reduce__(self) -> NoReturn:
        """Refuse to be written."""
        raise TypeError("CUDA graphs can't be pickled")


class _Step:
    """The step of the first slots, with its inputs and its output at fixed addresses.

    Args:
        part: Whose step it is.
        slots: Where the caches are.
        rows: Slots.
        width: Positions that are looked at.
        recorder: What makes a graph of it; `None` runs it as it is.
    """

    def __init__(
        self,
        part: SplitModel,
        slots: CacheSlots,
        rows: int,
        width: int,
        recorder: GraphRecorder | None,
    ) -> None:
        device = part.device
        self._device = device
        self._unused = slots.positions  # the position that is nobody's
        self._hidden = torch.zeros(
            rows, 1, *part.hidden_shape, dtype=part.hidden_dtype, device=device
        )
        # Of each slot: where it writes, how many positions it holds, and its position id.
        self._numbers = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._numbers[0] = self._unused
        # What the graph reads is kept for as long as there is the graph.
        self._columns = torch.arange(width, device=device)
        self._cache = _step_cache(part, slots, rows, width, self._numbers[0])
        self._part = weakref.ref(part)
        self._replay = self._forward if recorder is None else recorder.record(self._forward)

    def _forward(self) -> torch.Tensor:
        """Run the step as it is."""
        output = _there(self._part)(
            self._hidden,
            attention_mask=self._columns <= self._numbers[1][:, None, None, None],
            position_ids=self._numbers[2][:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return HiddenState.of(output).tensor

    def run(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        positions: Sequence[int],
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Run the step with what these slots are given; return what it gives for them."""
        rows = self._numbers.shape[1]
        numbers = torch.zeros(3, rows, dtype=torch.int64)
        numbers[0] = self._unused
        which = torch.tensor(slots)
        numbers[:, which] = torch.tensor([lengths, lengths, positions])
        self._numbers.copy_(on_device(numbers, self._device))
        here = on_device(which, self._device)
        self._hidden.index_copy_(0, here, on_device(hidden, self._device))
        return self._replay().index_select(0, here)


def _there(part: weakref.ref[SplitModel]) -> SplitModel:
    """Return the part whose graphs these are."""
    found = part()
    if found is None:
        raise RuntimeError("the part whose steps these are is gone")
    return found


def _first_of(error: BaseException) -> BaseException:
    """Return the error that another came of: what ends a recording only says that it failed."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _step_cache(
    part: SplitModel, slots: CacheSlots, rows: int, width: int, written: torch.Tensor
) -> PartCache:
    """Return what stands for the caches of the first slots, in a forward of one step."""
    cache: Any = object.__new__(_StepCache)
    cache.spec = part.spec
    length = width - 1  # with the new one as many as the mask is wide
    numbers = iter(range(part.spec.num_layers))
    layers: list[Any] = [
        layer.at(length)
        if isinstance(layer, GhostLayer)
        else slots.layer(next(numbers), rows, width, written, length)
        for layer in PartCache(part.config, part.spec).layers
    ]
    Cache.__init__(cache, layers=layers)
    found: PartCache = cache
    return found


class _StepCache(PartCache):
    """A cache that stays as long as it is: it is used again and again."""

    def advance_ghosts(self, positions: int) -> None:
        """Count nothing."""


def _growing(cache: PartCache) -> list[GrowingLayer]:
    """Return the layers of a cache that are the part's own."""
    return [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]


def _check_part(part: SplitModel) -> None:
    """Refuse a part whose steps can't be recorded."""
    if part.spec.is_first or part.spec.is_last:
        raise StepGraphError(f"CUDA graphs are for a Trunk, and this is {part.component}")
    if part.side_inputs or part.side_outputs:
        raise StepGraphError(f"{_unfit(part)}: more than the hidden state goes from part to part")
    layers = [layer for layer in part.new_cache().layers if not isinstance(layer, GhostLayer)]
    if not joinable(part).steps or not all(type(layer) is GrowingLayer for layer in layers):
        raise StepGraphError(
            f"{_unfit(part)}: its layers keep something else than keys and values of all positions"
        )
    if part.kv_bytes_per_position is None:
        raise StepGraphError(f"{_unfit(part)}: what its cache takes can't be told before")


def _unfit(part: SplitModel) -> str:
    return f"steps of {part.config.model_type} can't be CUDA graphs"


def _power(number: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
