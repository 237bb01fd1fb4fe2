"""Find out how an architecture is built by watching its own forward.

A small model of the architecture runs twice, on different tokens, with hooks on every module.  What
runs before the first layer belongs to Bottom, what runs after the last to Top.  How the layers are
called, and what they return, is noted as well; so is every value besides the hidden state that
depends on the tokens, since the parts would have to send it too.

The result is data: `families/certified.json` holds it for every architecture that was certified.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitlearn_core.families.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BEFORE, INSIDE, BETWEEN, AFTER, NEVER = "before", "inside", "between", "after", "never"
_POSITIONS = 7
_ROWS = 2


class NotAChainError(Exception):
    """The architecture is not one chain of layers that hand on a hidden state; says why."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its number, what it was given, what it returned."""

    number: int
    arguments: dict[int | str, Any]
    output: Any


@dataclass
class Trace:
    """What one forward showed.

    Attributes:
        phases: Module path -> when in the forward it was called.
        calls: The layers' calls, in order.
    """

    phases: dict[str, set[str]] = field(default_factory=dict)
    calls: list[LayerCall] = field(default_factory=list)


def observe(model: PreTrainedModel) -> Family:
    """Return how the architecture of `model` is built.

    Args:
        model: Small, with weights; it runs twice.

    Raises:
        NotAChainError: It can't be cut between its layers; says why.
    """
    path = find_layers(model)
    ids = torch.arange(_ROWS * _POSITIONS).reshape(_ROWS, _POSITIONS) % _token_count(model)
    first, second = trace(model, path, ids), trace(model, path, ids.flip(1))
    _check_order(first, len(model.get_submodule(path)))  # type: ignore[arg-type]
    hidden_argument, layer_returns = _handing_on(first)
    _check_side_values(first, second, hidden_argument)
    embeddings, epilogue, unused = _owners(model, path, first)
    return Family(
        layers=path,
        embeddings=embeddings,
        epilogue=epilogue,
        unused=unused,
        hidden_argument=hidden_argument,
        layer_returns=layer_returns,
        cache_argument=_cache_argument(model),
        **_config_keys(model.config),
    )


def find_layers(model: PreTrainedModel) -> str:
    """Return the path of the list of decoder layers: the largest list of their number.

    Raises:
        NotAChainError: There is none.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    sizes: dict[str, int] = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    if not any(sizes.values()):
        raise NotAChainError(f"it has no list of {wanted} layers")
    return max(sizes, key=lambda path: sizes[path])


def trace(model: PreTrainedModel, layers_path: str, input_ids: torch.Tensor) -> Trace:
    """Run `model` on `input_ids` (int64 [batch, positions]) and note what is called when."""
    watcher = _Watcher(model, layers_path)
    try:
        with torch.no_grad():
            model(input_ids, use_cache=False)
    finally:
        watcher.stop()
    return watcher.seen


class _Watcher:
    """Hooks on every module of a model."""

    def __init__(self, model: nn.Module, layers_path: str) -> None:
        self.seen = Trace()
        layers = list(model.get_submodule(layers_path).children())
        self._numbers = {module: number for number, module in enumerate(layers)}
        self._inner = {module for layer in layers for module in layer.modules()}
        self._paths = {module: path for path, module in model.named_modules()}
        self._phase = BEFORE
        self._open_layers = 0
        self._handles = [
            handle
            for module in self._paths
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            )
        ]

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, *_: Any) -> None:
        if module in self._numbers:
            self._open_layers += 1
        elif module not in self._inner:
            phase = INSIDE if self._open_layers else self._phase
            self.seen.phases.setdefault(self._paths[module], set()).add(phase)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if module not in self._numbers:
            return
        self._open_layers -= 1
        number = self._numbers[module]
        self._phase = AFTER if number == len(self._numbers) - 1 else BETWEEN
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        self.seen.calls.append(LayerCall(number, arguments, output))


def _check_order(seen: Trace, count: int) -> None:
    """Refuse what does not call each layer once, in order."""
    order = [call.number for call in seen.calls]
    if order != list(range(count)):
        raise NotAChainError(f"its layers are not called once each, in order, but as {order}")


def _handing_on(seen: Trace) -> tuple[int | str, int]:
    """Return which argument of a layer is the hidden state, and the length of what it returns."""
    places: set[int | str | None] = set()
    lengths: set[int] = set()
    for before, call in pairwise(seen.calls):
        hidden = _hidden_of(before.output)
        places.add(next((k for k, v in call.arguments.items() if v is hidden), None))
        lengths.add(len(before.output) if isinstance(before.output, (tuple, list)) else 0)
    place = places.pop() if len(places) == 1 else None
    if place is None or len(lengths) != 1:
        raise NotAChainError("a layer is not given what the layer before it returned")
    return place, lengths.pop()


def _hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden state of what a layer returned."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, torch.Tensor):
        raise NotAChainError(f"a layer returns {type(output).__name__}, not a hidden state")
    return first


def _check_side_values(first: Trace, second: Trace, hidden_argument: int | str) -> None:
    """Refuse layers that are given more than the hidden state that depends on the tokens."""
    side = {
        key
        for one, other in zip(first.calls, second.calls, strict=True)
        for key, value in one.arguments.items()
        if key != hidden_argument and not _same(value, other.arguments.get(key))
    }
    if side:
        named = ", ".join(sorted(map(str, side)))
        raise NotAChainError(f"its layers need more than the hidden state: {named}")


def _same(one: Any, other: Any) -> bool:
    """Whether the tensors in two values are equal."""
    ours, theirs = list(_tensors(one)), list(_tensors(other))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _owners(
    model: PreTrainedModel, layers_path: str, seen: Trace
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the outermost modules with weights that run before all layers, after them, and never.

    Those that run in several phases (weights that layers share, say) are left to every part.
    """
    owners: dict[str, list[str]] = {BEFORE: [], AFTER: [], NEVER: []}
    for path, module in model.named_modules():
        around = path == "" or layers_path.startswith(f"{path}.")
        if around or path.startswith(layers_path) or not _has_own_weights(module):
            continue
        phases = seen.phases.get(path, {NEVER})
        if len(phases) == 1 and (phase := next(iter(phases))) in owners:
            known = [other for paths in owners.values() for other in paths]
            if not any(path.startswith(f"{other}.") for other in known):
                owners[phase].append(path)
    return tuple(owners[BEFORE]), tuple(owners[AFTER]), tuple(owners[NEVER])


def _cache_argument(model: PreTrainedModel) -> str:
    """Return what the forward calls its cache."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "past_key_values" not in names else "past_key_values"


def _config_keys(config: PreTrainedConfig) -> dict[str, str]:
    """Return the names that `config.json` has for sizes that configs name differently."""
    renamed = config.get_text_config(decoder=True).attribute_map
    standard = {
        "layer_count_key": "num_hidden_layers",
        "hidden_size_key": "hidden_size",
        "max_positions_key": "max_position_embeddings",
    }
    return {ours: renamed.get(theirs, theirs) for ours, theirs in standard.items()}


def _token_count(model: PreTrainedModel) -> int:
    """Return the number of token ids."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _has_own_weights(module: nn.Module) -> bool:
    """Whether a module has parameters that are not a submodule's."""
    return next(module.parameters(recurse=False), None) is not None
