"""Whether a model has LoRA adapters in it, which its weights alone would lose."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters: of what it computes, its weights alone would be a part.

    Raises:
        ValueError: It has some; says what to do.
    """
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(
            "this model has LoRA adapters, which its weights alone would lose: merge them first"
            " (merge_lora), or save them by themselves (save_lora)"
        )
