"""How the hidden state, and what goes with it, comes into a part's forward and leaves it.

Both happen where a layer is called: the first own layer is given what came from the part before,
and the first absent one is asked what it was given.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.families.family import CARRY, CONSTANT, LAYERWISE, SHARED
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.side_values import made_values, received_values, shared_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from splitlearn_core.cache import PartCache
    from splitlearn_core.families import Family
    from splitlearn_core.families.family import SideValue
    from splitlearn_core.plan import ComponentSpec


class HiddenStateLeaves(Exception):  # noqa: N818 - a way out of a forward, not an error
    """Carries the hidden state out of the forward at the end of a part's own layers."""

    def __init__(self, hidden_states: torch.Tensor | HiddenState) -> None:
        super().__init__("the hidden state leaves this part")
        self.hidden_states = hidden_states


class Arguments:
    """The arguments of one call of a layer, by position or name."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args = list(args)
        self._kwargs = dict(kwargs)

    def get(self, where: int | str) -> Any:
        """Return an argument, or `None` where it was not given."""
        if isinstance(where, int):
            return self._args[where] if where < len(self._args) else None
        return self._kwargs.get(where)

    def put(self, where: int | str, value: Any) -> None:
        """Give the layer another value for an argument that it was given."""
        if isinstance(where, int):
            self._args[where] = value
        else:
            self._kwargs[where] = value

    @property
    def both(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as a hook returns them."""
        return tuple(self._args), self._kwargs


class Passage(threading.local):
    """Where the running forward of this thread finds what it was given, and leaves what goes on.

    Attributes:
        embedding_width: Width of the token embedding that the forward would have begun with.
        given: What came from the part before; `None` between forwards.
        dtype: Dtype that the embeddings would have had.
        cache: The part's cache, where the forward has one.
        new: New positions of the step.
    """

    given: HiddenState | None = None
    dtype: torch.dtype = torch.float32
    cache: PartCache | None = None
    new: int = 0

    def __init__(
        self, family: Family, spec: ComponentSpec, config: PreTrainedConfig, embedding_width: int
    ) -> None:
        self.embedding_width = embedding_width
        self._config = config
        self._family = family
        self._spec = spec
        self._num_layers = int(config.get_text_config(decoder=True).num_hidden_layers)
        self._received = {v.name for v in received_values(family, config, spec, self.dtype)}
        self._made = {v.name for v in made_values(family, config, spec, self.dtype)}
        self._leaving: HiddenState | None = None
        self._rows: dict[str, list[torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        """Return one for the copy of a part, with no forward running in it."""
        config = copy.deepcopy(self._config, memo)
        return Passage(self._family, self._spec, config, self.embedding_width)

    def begin(self, given: HiddenState | None, new: int, dtype: torch.dtype, cache: Any) -> None:
        """Take what a forward is given, before it runs."""
        self.given, self.new, self.dtype, self.cache = given, new, dtype, cache

    def end(self) -> None:
        """Let go of it all, after the forward."""
        self.given = self.cache = self._leaving = None
        self._rows = {}

    @property
    def device(self) -> torch.device | None:
        """Device of what came from the part before; `None` where nothing did."""
        return None if self.given is None else self.given.device

    # --- In --------------------------------------------------------------------------------

    def enter(self, number: int, call: Arguments) -> None:
        """Give layer `number`, which is the part's own, what was received for it."""
        if self.given is None:
            raise RuntimeError("the part was run without what the part before it returned")
        first = number == min(self._spec.start_layer, self._num_layers - 1)
        if first:
            call.put(self._family.hidden_argument, self._entering(self.given, call))
        if self._spec.num_layers:
            for side in self._family.side:
                self._feed(side, number, call, self.given, first=first)

    def _entering(self, given: HiddenState, call: Arguments) -> torch.Tensor:
        """Return the hidden state in the form in which layers take it.

        Where layers share keys and values, a forward may drop positions that nobody asked for
        before the first of those layers, and expects as many fewer from then on.
        """
        tensor = given.tensor
        if any(side.kind == SHARED for side in self._family.side):
            kept = call.get(self._family.hidden_argument).shape[self._family.batch_axis + 1]
            tensor = tensor[:, tensor.shape[1] - kept :]
        return tensor.movedim(2, 0).contiguous() if self._family.batch_axis else tensor

    def _feed(
        self, side: SideValue, number: int, call: Arguments, given: HiddenState, *, first: bool
    ) -> None:
        """Give a layer one side value, if that comes from outside."""
        if side.kind == SHARED:
            if first:
                self._fill(side, call, given)
            return
        value = given.side.get(side.name)
        if value is None or (side.kind == CARRY and not first):
            return
        if side.kind == LAYERWISE:
            kept = call.get(self._family.hidden_argument).shape[self._family.batch_axis + 1]
            value = value[:, value.shape[1] - kept :, number - self._spec.start_layer]
        call.put(side.argument, value)

    def _fill(self, side: SideValue, call: Arguments, given: HiddenState) -> None:
        """Put the keys and values of all positions where earlier layers would have left them."""
        shared = call.get(side.argument)
        for key in _keys(side, self._received):
            states = [given.side[name].transpose(1, 2) for name in shared_names(side, key)]
            if self.cache is not None:
                states = list(self.cache.extend_shared(key, *states))
            shared[key] = tuple(states)

    # --- Out -------------------------------------------------------------------------------

    def leave(self, number: int, call: Arguments) -> None:
        """Take what layer `number`, which is a later part's, is given.

        Raises:
            HiddenStateLeaves: Everything that goes on has been seen.
        """
        layerwise = [side for side in self._family.side if side.kind == LAYERWISE]
        if number == self._spec.end_layer:
            side = dict(self._side_values(call))
            self._leaving = HiddenState(self._handed(call.get(self._family.hidden_argument)), side)
        if self._spec.is_first:
            for side_value in layerwise:
                self._collect(side_value, call)
        if not (self._spec.is_first and layerwise) or number == self._num_layers - 1:
            raise HiddenStateLeaves(self._complete().handed_on)

    def leave_after_last(self, output: Any) -> None:
        """Take what the model's last layer returned: the next part is the head alone.

        Raises:
            HiddenStateLeaves: Always.
        """
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        raise HiddenStateLeaves(self._handed(hidden))

    def _handed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden state in the form in which parts hand it on: batch first."""
        return hidden.movedim(0, 2) if self._family.batch_axis else hidden

    def _side_values(self, call: Arguments) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what goes on besides the hidden state, but for what is to be collected."""
        received = {} if self.given is None else self.given.side
        for side in self._family.side:
            if side.kind == CONSTANT:
                value = call.get(side.argument) if self._spec.is_first else received.get(side.name)
            elif side.kind == CARRY:
                value = call.get(side.argument)
            elif side.kind == LAYERWISE:
                value = self._left_over(received.get(side.name))
            else:
                yield from self._shared(side, call, received)
                continue
            if value is not None:
                yield side.name, value

    def _left_over(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Return what there is for the layers of later parts."""
        own = self._spec.num_layers
        return None if rows is None or rows.shape[2] <= own else rows[:, :, own:]

    def _shared(
        self, side: SideValue, call: Arguments, received: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield keys and values of the new positions: received ones, and those made here."""
        for name, value in received.items():
            if name.startswith(f"{side.name}."):
                yield name, value
        shared = call.get(side.argument)
        for key in _keys(side, self._made):
            for name, states in zip(shared_names(side, key), shared[key], strict=True):
                yield name, states[:, :, states.shape[2] - self.new :].transpose(1, 2)

    def _collect(self, side: SideValue, call: Arguments) -> None:
        """Note what a later part's layer is given that is its own."""
        row = call.get(side.argument)
        if row is not None:
            self._rows.setdefault(side.name, []).append(row)

    def _complete(self) -> HiddenState:
        """Return all that goes on."""
        if self._leaving is None:
            raise RuntimeError("the layer after the part's own was passed over")
        rows = {name: torch.stack(rows, dim=2) for name, rows in self._rows.items()}
        dropped = self._leaving.tensor.shape[1] != self.new
        return HiddenState(
            self._leaving.tensor, {**self._leaving.side, **rows}, self.new if dropped else None
        )


def _keys(side: SideValue, names: set[str]) -> list[str]:
    """Return the kinds of layers whose keys are among `names`."""
    found = {name.split(".")[1] for name in names if name.startswith(f"{side.name}.")}
    return sorted(found)
