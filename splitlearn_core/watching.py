"""Watch a model's forward: which modules are called when, and how its layers are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BEFORE, INSIDE, BETWEEN, AFTER, NEVER = "before", "inside", "between", "after", "never"


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
