"""The one splitting rule.

A part is the architecture's own `…ForCausalLM` with what it does not own taken out:

* layers outside of `[start_layer, end_layer)`, and embeddings or head of the other parts, become
  stubs without weights; absolute layer numbers stay, so configs, cache slots, adapter names and
  checkpoint names remain valid;
* the hidden state that comes in replaces whatever the first own layer would have been given;
* the hidden state that goes out is taken where the first absent layer would have begun;
* values that layers are given besides it, and that depend on the tokens, go the same way.

Hugging Face's own forward thus makes masks, positions, rotary tables and cache updates in every
part, and the parts together compute what the unsplit model computes, to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitlearn_core.families.family import CONSTANT, LAYERWISE
from splitlearn_core.passage import Arguments, Passage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.plan import ComponentSpec


class AbsentModule(nn.Module):
    """Stands where a module of another part was, without its weights.

    Some architectures read attributes of a module before they call it (which kind of attention a
    layer has, say); those are still the real module's, which stays on the meta device.
    """

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self._real = (real,)  # in a tuple, so that its weights are not ours

    @property
    def real(self) -> nn.Module:
        """The module itself, on the meta device."""
        return self._real[0]

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

    def __init__(self, real: nn.Module, passage: Passage) -> None:
        super().__init__(real)
        self._passage = passage

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros [1, 1, width], which can be added to any hidden state.

        They have the table's dtype: another would change that of the sum.  They lie where the
        hidden state does, with which no other device's could be added.
        """
        table: Any = self.real
        shape = (1, 1, self.embedding_dim)
        return torch.zeros(shape, dtype=table.weight.dtype, device=self._passage.device)


class AbsentTable(AbsentModule):
    """Stands where a table by token ids was, in a model that looks them up more than once."""

    def __init__(self, real: nn.Module, passage: Passage) -> None:
        super().__init__(real)
        self._passage = passage

    def forward(self, values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros [*ids, width] of the dtype that the table has, without allocating them."""
        zero = torch.zeros((), dtype=self._passage.dtype, device=values.device)
        return zero.expand(*values.shape, self.embedding_dim)

    @property
    def weight(self) -> torch.Tensor:
        """Zeros of the table's shape, for code that looks into it itself."""
        zero = torch.zeros((), dtype=self._passage.dtype, device=self._passage.device)
        return zero.expand(self.num_embeddings, self.embedding_dim)


class AbsentLinear(AbsentModule):
    """Stands where another part's projection was; what it returns is never used."""

    def forward(self, values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros of the projection's shape, which may be changed in place."""
        return values.new_zeros(*values.shape[:-1], self.out_features)


class AbsentLayer(AbsentModule):
    """Stands where a layer before the part's own was: hands the hidden state on."""

    def __init__(self, real: nn.Module, family: Family) -> None:
        super().__init__(real)
        self._family = family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state, in the form in which the real layer does."""
        hidden_states = Arguments(args, kwargs).get(self._family.hidden_argument)
        missing = (None,) * (self._family.layer_returns - 1)
        return (hidden_states, *missing) if self._family.layer_returns else hidden_states


class LeavingLayer(AbsentLayer):
    """Stands where a layer after the part's own was: the hidden state leaves here."""

    def __init__(self, real: nn.Module, family: Family, number: int, passage: Passage) -> None:
        super().__init__(real, family)
        self._number = number
        self._passage = passage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `HiddenStateLeaves`, or go on to the next layer where that is to be asked, too."""
        self._passage.leave(self._number, Arguments(args, kwargs))
        return super().forward(*args, **kwargs)


def prune(model: PreTrainedModel, family: Family, spec: ComponentSpec) -> Passage:
    """Take out of `model` (the unsplit one, on any device) what `spec` does not own, in place.

    Returns:
        The place where a forward of a part that is not the first finds its input.
    """
    layers = model.get_submodule(family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{family.layers} of {type(model).__name__} is no list of layers")
    embedding: Any = model.get_input_embeddings()
    passage = Passage(family, spec, model.config, embedding.weight.shape[1])
    _replace_layers(layers, family, spec, passage)
    if not (spec.is_first and spec.is_last):
        _replace(model, family.unused, passage)
    if not spec.is_first:
        _replace(model, family.embeddings, passage, by_ids=bool(family.side))
    if not spec.is_last:
        _replace(model, family.epilogue, passage)
    if not spec.is_first:
        _let_in(layers, family, spec, passage)
    if not spec.is_last and spec.end_layer == len(layers):
        layers[-1].register_forward_hook(partial(_leave, passage=passage))
    return passage


def _replace_layers(
    layers: nn.ModuleList, family: Family, spec: ComponentSpec, passage: Passage
) -> None:
    """Put stubs in the place of the layers that the part does not own."""
    for number, layer in enumerate(layers):
        if number < spec.start_layer:
            layers[number] = AbsentLayer(layer, family)
        elif number >= spec.end_layer:
            layers[number] = LeavingLayer(layer, family, number, passage)


def _replace(
    model: nn.Module, paths: tuple[str, ...], passage: Passage, *, by_ids: bool = False
) -> None:
    """Put a stub without weights in the place of each module in `paths`.

    Args:
        model: Changed in place.
        paths: Its modules.
        passage: Where the forward is.
        by_ids: Whether stubs of embeddings are to tell the shape of ids.
    """
    for path in paths:
        parent, _, name = path.rpartition(".")
        if getattr(model.get_submodule(parent), name, None) is None:
            continue  # a config may leave it out
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            _replace(module, tuple(map(str, range(len(module)))), passage, by_ids=by_ids)
        else:
            setattr(model.get_submodule(parent), name, _stub(module, passage, by_ids=by_ids))


def _stub(module: nn.Module, passage: Passage, *, by_ids: bool) -> AbsentModule:
    """Return what stands in the place of a module."""
    if isinstance(module, nn.Embedding):
        return (AbsentTable if by_ids else AbsentEmbedding)(module, passage)
    return AbsentLinear(module) if isinstance(module, nn.Linear) else AbsentModule(module)


def _let_in(layers: nn.ModuleList, family: Family, spec: ComponentSpec, passage: Passage) -> None:
    """Make the first own layer see what was received, and the others where they need it.

    Where there is no own layer, the last stub sees it.
    """
    first = min(spec.start_layer, len(layers) - 1)
    each = any(side.kind in {CONSTANT, LAYERWISE} for side in family.side)
    for number in range(first, spec.end_layer if each and spec.num_layers else first + 1):
        hook = partial(_enter, passage=passage, number=number)
        layers[number].register_forward_pre_hook(hook, with_kwargs=True)


def put_passage_outside(layer: nn.Module, outer: nn.Module | None = None) -> None:
    """Make the hooks of `_let_in`, and the way out, come before and after all others of a layer.

    Whoever else has hooks there (FSDP does) then sees what the layer is really given, and is done
    with it when the hidden state leaves.

    Args:
        layer: Of a pruned model.
        outer: Wraps the layer, and is called in its stead: the hooks go there.
    """
    target = layer if outer is None else outer
    for key, hook in list(layer._forward_pre_hooks.items()):  # noqa: SLF001 - order has no other door
        if getattr(hook, "func", None) is _enter:
            del layer._forward_pre_hooks[key]  # noqa: SLF001
            layer._forward_pre_hooks_with_kwargs.pop(key, None)  # noqa: SLF001
            target.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    for key, after in list(layer._forward_hooks.items()):  # noqa: SLF001
        if getattr(after, "func", None) is _leave:
            del layer._forward_hooks[key]  # noqa: SLF001
            target.register_forward_hook(after)


# The hooks are partial functions, not closures: `copy.deepcopy` looks into those and gives the copy
# of a part hooks with the copy of its passage; closures it would leave with the original's.


def _enter(
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    passage: Passage,
    number: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give layer `number` what was received for it."""
    call = Arguments(args, kwargs)
    passage.enter(number, call)
    return call.both


def _leave(_: nn.Module, __: tuple[Any, ...], output: Any, *, passage: Passage) -> None:
    """Leave the forward with what the last layer returned."""
    passage.leave_after_last(output)
