"""The modules that peft puts around a model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

BASE_LAYER = "base_layer"
"""Under which such a module holds the model's own."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module has adapters: it is peft's, around the model's own."""
    return hasattr(module, "lora_A") and hasattr(module, BASE_LAYER)


def can_have(module: nn.Module) -> bool:
    """Whether an adapter can go beside a module of the model's own."""
    return isinstance(module, nn.Linear | Conv1D | nn.Embedding)


def real_module(layer: nn.Module) -> Any:
    """Return the model's own module."""
    return layer.get_base_layer() if is_layer(layer) else layer  # type: ignore[operator]


def names_of(layer: Any) -> list[str]:
    """Return the adapters that one module has."""
    return [*layer.lora_A, *layer.lora_embedding_A]


def factor_parameters(layer: Any, name: str) -> tuple[torch.Tensor, ...]:
    """Return A and B of an adapter; nothing where the module has none of that name."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return ()
