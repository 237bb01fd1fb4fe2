"""The parts of a model one after the other, here and elsewhere, for many sequences at once.

Everything here runs in the thread of a model.  A part that is here takes what can share a forward
together, packed into one row or as one batch, and the rest one by one; one that is elsewhere is
sent the steps of all sequences together, so that its server can do the same.  A sequence for which
a part fails goes no further, and the others are not concerned.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from splitlearn_core import SplitModel
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.joined_cache import JoinedCache, joinable, joinable_cache, takes_chunks
from splitlearn_core.packed_cache import PackedCache
from splitlearn_core.session_attention import attend_in_place
from splitlearn_manager.client.remote_cache import RemoteStep

if TYPE_CHECKING:
    from splitlearn_core.cache import PartCache


@dataclass(eq=False, slots=True)
class Lane:
    """One sequence's way through the parts.

    Attributes:
        caches: Of each part.
        length: Positions that they hold.
        forgets: Whether they hold nothing, so that each step brings all tokens again: there are
            architectures that keep no cache.
    """

    caches: list[Any]
    length: int = 0
    forgets: bool = False


@dataclass(eq=False, slots=True)
class Step:
    """New positions of one sequence.

    Attributes:
        lane: The sequence's.
        given: What the next part takes: token ids int64 [1, new], then hidden states.
        keep: Of how many of its last positions logits are wanted; 0 for all.
        error: Why it goes no further.
        new: How many positions there are.
    """

    lane: Lane
    given: HiddenState
    keep: int = 1
    error: Exception | None = None
    new: int = field(init=False)

    def __post_init__(self) -> None:
        """Note how many positions there are: what parts give may be of the last ones alone."""
        self.new = self.given.new

    @property
    def kept(self) -> int:
        """Of how many positions there will be logits."""
        return min(self.keep, self.new) if self.keep else self.new

    def positions(self) -> torch.Tensor:
        """Return their position ids, int64 [1, new]."""
        start = self.lane.length
        return torch.arange(start, start + self.new)[None]


class Stage(Protocol):
    """A part, as the chain uses it."""

    def new_cache(self, traceparent: str | None) -> Any:
        """Return an empty cache for one sequence, of a request with that span."""
        ...

    def advance(self, steps: Sequence[Step], caches: Sequence[Any]) -> None:
        """Run the part for steps, of which each has its cache; sets what they give, or why not."""
        ...


class LocalStage:
    """A part that is here.

    Args:
        part: Bottom, a Trunk, Top, or the whole model.
    """

    def __init__(self, part: SplitModel) -> None:
        self.part = part
        self._in_place = attend_in_place(part)
        self._can = joinable(part)
        self._last = part.spec.is_last
        self._holds = part.spec.num_layers > 0

    def new_cache(self, traceparent: str | None) -> Any:
        """Return an empty cache."""
        del traceparent
        return joinable_cache(self.part)

    @property
    def packs(self) -> bool:
        """Whether steps of any lengths are one forward."""
        return self._can.packed

    def keeps(self, cache: PartCache) -> bool:
        """Whether a cache that was filled holds something, or nothing belongs into it."""
        return not self._holds or cache.nbytes > 0

    def advance(self, steps: Sequence[Step], caches: Sequence[Any]) -> None:
        """Run what can share a forward together, and the rest alone."""
        pairs = list(zip(steps, caches, strict=True))
        if self.packs and len(pairs) > 1 and self._packed(pairs):
            return
        shared = [pair for pair in pairs if self._shares(pair[0])]
        if not self.packs and len(shared) > 1 and self._together(shared):
            pairs = [pair for pair in pairs if not self._shares(pair[0])]
        for step, cache in pairs:
            _guard(step, partial(self._alone, step, cache))

    def _shares(self, step: Step) -> bool:
        return self._can.steps and step.new == 1 and step.lane.length > 0

    def _alone(self, step: Step, cache: Any) -> HiddenState:
        return self._call(step.given, None, step.positions(), cache, step.keep)

    def _packed(self, pairs: Sequence[tuple[Step, PartCache]]) -> bool:
        """Run steps in one row; `False` if that failed: whose fault it is shows when alone."""
        steps = [step for step, _ in pairs]
        packed = PackedCache([cache for _, cache in pairs], [(1, step.new) for step in steps])
        try:
            output = self._call(
                packed.pack([step.given for step in steps]),
                packed.mask if self._holds else None,
                torch.cat([step.positions() for step in steps], dim=1),
                packed if self._holds else None,
                _kept(steps),
            )
        except Exception:  # noqa: BLE001 - see above
            packed.roll_back()
            return False
        packed.commit()
        start = 0
        for step in steps:
            stop = start + (step.kept if self._last else step.new)
            step.given = output.between(start, stop)
            start = stop
        return True

    def _together(self, pairs: Sequence[tuple[Step, PartCache]]) -> bool:
        """Run a batch; `False` if that failed: whose fault it is shows when each runs alone."""
        caches = [cache for _, cache in pairs]
        joined = JoinedCache(caches, in_place=self._in_place) if self._holds else None
        try:
            given = HiddenState.joined([step.given for step, _ in pairs], dim=0)
            positions = torch.cat([step.positions() for step, _ in pairs])
            mask = joined.mask(1) if joined is not None and self._can.mask else None
            output = self._call(given, mask, positions, joined, 1)
        except Exception:  # noqa: BLE001 - see above
            if joined is not None:
                joined.roll_back()
            return False
        if joined is not None:
            joined.commit()
        for number, (step, _) in enumerate(pairs):
            step.given = output.rows(slice(number, number + 1))
        return True

    def _call(
        self,
        given: HiddenState,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: Any,
        keep: int | torch.Tensor,
    ) -> HiddenState:
        """Run the part; its logits are a `HiddenState` as well."""
        wishes = {"logits_to_keep": keep} if self._last else {}
        output = self.part(
            given.handed_on,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **wishes,
        )
        return HiddenState(output.logits) if self._last else HiddenState.of(output)


class RemoteStage:
    """A part that is elsewhere.

    Args:
        trunk: A `RemoteTrunk`.
    """

    def __init__(self, trunk: Any) -> None:
        self.trunk = trunk

    def new_cache(self, traceparent: str | None) -> Any:
        """Return an empty cache: a session there, from its first step on."""
        return self.trunk.new_cache(traceparent=traceparent)

    def advance(self, steps: Sequence[Step], caches: Sequence[Any]) -> None:
        """Send all steps at once, and wait for every answer."""
        sent = [
            RemoteStep(cache, step.given.handed_on, None, step.positions())
            for step, cache in zip(steps, caches, strict=True)
        ]
        for step, answer in zip(steps, self.trunk.step_together(sent), strict=True):
            if isinstance(answer, Exception):
                step.error = answer
            else:
                step.given = HiddenState.of(answer)


def _kept(steps: Sequence[Step]) -> torch.Tensor:
    """Return where in a row of all steps logits are wanted, int64."""
    ends = itertools.accumulate(step.new for step in steps)
    return torch.cat(
        [torch.arange(end - step.kept, end) for end, step in zip(ends, steps, strict=True)]
    )


def _guard(step: Step, run: Callable[[], HiddenState]) -> None:
    """Run a step by itself; what it raises is its own."""
    try:
        step.given = run()
    except Exception as error:  # noqa: BLE001 - it is the answer to this sequence alone
        step.error = error


@dataclass
class Chain:
    """All parts of a model, in the order of its layers.

    Attributes:
        stages: The parts; the last one is here.
        chunks: Whether a prompt may come in pieces.
        mixes: Whether pieces of prompts can be in the same forward as steps, in every part here.
        vocabulary: Tokens that there are.
        max_positions: Positions that the model was made for, if its config says.
        bytes_per_position: What the cache of each part that is here takes for a position; 0 if not
            known.
    """

    stages: list[Stage]
    chunks: bool
    mixes: bool
    vocabulary: int
    max_positions: int | None
    bytes_per_position: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Any) -> Chain:
        """Return the chain of a pipeline, of a `SplitCausalLM`, or of a whole model."""
        parts = [model] if isinstance(model, SplitModel) else list(_parts(model))
        here = [part for part in parts if isinstance(part, SplitModel)]
        last = here[-1]
        config: Any = last.config.get_text_config(decoder=True)
        stages: list[Stage] = [
            LocalStage(part) if isinstance(part, SplitModel) else RemoteStage(part)
            for part in parts
        ]
        chunks = takes_chunks(last)
        return cls(
            stages=stages,
            chunks=chunks,
            mixes=chunks and all(stage.packs for stage in stages if isinstance(stage, LocalStage)),
            vocabulary=int(config.vocab_size),
            max_positions=last.max_positions,
            bytes_per_position=tuple(part.kv_bytes_per_position or 0 for part in here),
        )

    def new_lane(self, traceparent: str | None = None) -> Lane:
        """Return a lane for a sequence that begins."""
        return Lane([stage.new_cache(traceparent) for stage in self.stages])

    def note_length(self, lane: Lane, positions: int) -> None:
        """Count positions that were run."""
        lane.length += positions
        if lane.length > positions:
            return  # whether its caches hold anything was seen the first time
        lane.forgets = not all(
            stage.keeps(cache)
            for stage, cache in zip(self.stages, lane.caches, strict=True)
            if isinstance(stage, LocalStage)
        )

    def copy(self, lane: Lane) -> Lane:
        """Return another lane that holds the same, and goes its own way.

        Raises:
            Exception: A part that is elsewhere has no room for another.
        """
        caches = [cache.copy() for cache in lane.caches]
        return Lane(caches, lane.length, lane.forgets)

    def run(self, steps: Sequence[Step]) -> None:
        """Run steps through every part; afterwards each has its logits in `given`, or an error.

        The logits are [1, kept, vocabulary], of the dtype of the last part.
        """
        with torch.inference_mode():
            for number, stage in enumerate(self.stages):
                going = [step for step in steps if step.error is None]
                if going:
                    stage.advance(going, [step.lane.caches[number] for step in going])


def _parts(model: Any) -> Sequence[Any]:
    """Return the parts of a pipeline, or of the chain itself."""
    chain = getattr(model, "model", model)
    parts: Sequence[Any] = chain.parts
    return parts


def ids_of(tokens: Sequence[int]) -> HiddenState:
    """Return tokens as what Bottom takes."""
    return HiddenState(torch.tensor([tokens], dtype=torch.int64))


def logits_of(step: Step) -> torch.Tensor:
    """Return what a step gave, [kept, vocabulary], on the CPU."""
    return step.given.tensor[0].cpu()
