"""The one splitting rule.

A part is the architecture's own `…ForCausalLM` with what it does not own taken out:

* layers outside of `[start_layer, end_layer)`, and embeddings or head of the other parts, become
  stubs without weights; absolute layer numbers stay, so configs, cache slots, adapter names and
  checkpoint names remain valid;
* the hidden state that comes in replaces whatever the first own layer would have been given;
* the hidden state that goes out is taken where the first absent layer would have begun.

Hugging Face's own forward thus makes masks, positions, rotary tables and cache updates in every
part, and the parts together compute what the unsplit model computes, to the bit.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.plan import ComponentSpec


class HiddenStateLeaves(Exception):  # noqa: N818 - a way out of a forward, not an error
    """Carries the hidden state out of the forward at the end of a part's own layers."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__("the hidden state leaves this part")
        self.hidden_states = hidden_states


class Inlet(threading.local):
    """The hidden state that the running forward of this thread was given.

    Attributes:
        embedding_width: Width of the token embedding that the forward would have begun with.
        hidden_states: What was given.
    """

    hidden_states: torch.Tensor | None = None

    def __init__(self, embedding_width: int) -> None:
        self.embedding_width = embedding_width


class AbsentModule(nn.Module):
    """Stands where a module of another part was, without its weights.

    Some architectures read attributes of a module before they call it (which kind of attention a
    layer has, say); those are still the real module's, which stays on the meta device.
    """

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self._real = (real,)  # in a tuple, so that its weights are not ours

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"][0], name)

    def forward(self, values: Any, *_: Any, **__: Any) -> Any:
        """Return what was given: whatever is computed here is never used."""
        return values


class AbsentEmbedding(AbsentModule):
    """Stands where another part's embedding was; what it returns is never used."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros [1, 1, width], which can be added to any hidden state."""
        return torch.zeros(1, 1, self.embedding_dim)


class AbsentLinear(AbsentModule):
    """Stands where another part's projection was; what it returns is never used."""

    def forward(self, values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros of the projection's shape, without allocating them."""
        return values.new_zeros(()).expand(*values.shape[:-1], self.out_features)


class AbsentLayer(AbsentModule):
    """Stands where a layer before the part's own was: hands the hidden state on."""

    def __init__(self, real: nn.Module, family: Family) -> None:
        super().__init__(real)
        self._family = family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state, in the form in which the real layer does."""
        hidden_states = _hidden_argument(self._family, args, kwargs)
        missing = (None,) * (self._family.layer_returns - 1)
        return (hidden_states, *missing) if self._family.layer_returns else hidden_states


class LeavingLayer(AbsentLayer):
    """Stands where the layer after the part's own was: the hidden state leaves here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `HiddenStateLeaves`."""
        raise HiddenStateLeaves(_hidden_argument(self._family, args, kwargs))


def prune(model: PreTrainedModel, family: Family, spec: ComponentSpec) -> Inlet:
    """Take out of `model` (the unsplit one, on any device) what `spec` does not own, in place.

    Returns:
        The place where a forward of a part that is not the first finds its input.
    """
    layers = model.get_submodule(family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{family.layers} of {type(model).__name__} is no list of layers")
    embedding: Any = model.get_input_embeddings()
    inlet = Inlet(embedding.weight.shape[1])
    _replace_layers(layers, family, spec)
    if not (spec.is_first and spec.is_last):
        _replace(model, family.unused)
    if not spec.is_first:
        _replace(model, family.embeddings)
    if not spec.is_last:
        _replace(model, family.epilogue)
    if not spec.is_first:
        _let_in(layers, family, spec, inlet)
    if not spec.is_last and spec.end_layer == len(layers):
        _let_out_after_last(layers)
    return inlet


def _hidden_argument(family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden state among the arguments that a layer is called with."""
    where = family.hidden_argument
    return args[where] if isinstance(where, int) else kwargs[where]


def _replace_layers(layers: nn.ModuleList, family: Family, spec: ComponentSpec) -> None:
    """Put stubs in the place of the layers that the part does not own."""
    for number, layer in enumerate(layers):
        if number < spec.start_layer:
            layers[number] = AbsentLayer(layer, family)
        elif number >= spec.end_layer:
            layers[number] = LeavingLayer(layer, family)


def _replace(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Put a stub without weights in the place of each module in `paths`."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        kinds = {nn.Embedding: AbsentEmbedding, nn.Linear: AbsentLinear}
        stub = next((kinds[k] for k in kinds if isinstance(module, k)), AbsentModule)
        setattr(model.get_submodule(parent), name, stub(module))


def _let_in(layers: nn.ModuleList, family: Family, spec: ComponentSpec, inlet: Inlet) -> None:
    """Make the first own layer (a stub, where there is none) see the received hidden state."""

    def replace_input(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        where = family.hidden_argument
        if isinstance(where, int):
            return (*args[:where], inlet.hidden_states, *args[where + 1 :]), kwargs
        return args, {**kwargs, where: inlet.hidden_states}

    first = layers[min(spec.start_layer, len(layers) - 1)]
    first.register_forward_pre_hook(replace_input, with_kwargs=True)


def _let_out_after_last(layers: nn.ModuleList) -> None:
    """Let the hidden state leave after the model's last layer: the next part is the head alone."""

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        raise HiddenStateLeaves(output[0] if isinstance(output, (tuple, list)) else output)

    layers[-1].register_forward_hook(leave)
