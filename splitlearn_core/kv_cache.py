"""How much a part's KV cache grows with each token, from the config alone.

Each attention layer keeps a key and a value for each token: tensors [batch, key-value heads,
tokens, head size] (`DynamicLayer` in transformers' `cache_utils.py`).  So it takes

    2 x key-value heads x head size x bytes of an element

for each token and layer; multi-query attention has one key-value head.  Latent attention (MLA)
keeps the latent and the rotary part of the key instead: (kv_lora_rank + qk_rope_head_dim) elements.
A layer with a sliding window takes as much, until its window is full.

Where layers keep other states (recurrent ones, indices), or differ in their heads, nothing is said.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.plan import ComponentSpec

_KEYS_AND_VALUES = {DynamicLayer, DynamicSlidingWindowLayer}


def kv_bytes_per_token(
    model: PreTrainedModel, family: Family, spec: ComponentSpec, itemsize: int
) -> int | None:
    """Return the bytes that a part's cache takes for each token of each sequence.

    Args:
        model: Of the architecture, with or without weights.
        family: How it is built.
        spec: The layers of the part.
        itemsize: Bytes of an element of the hidden state.

    Returns:
        `None` where the formula above does not hold.
    """
    if family.cache_argument not in inspect.signature(type(model).forward).parameters:
        return None
    config: Any = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers[spec.start_layer : spec.end_layer]
    ordinary = all(type(layer) in _KEYS_AND_VALUES for layer in layers)
    if not ordinary or len(layers) != spec.num_layers:
        return None
    elements = _elements_per_layer(config)
    return None if elements is None else spec.num_layers * elements * itemsize


def _elements_per_layer(config: Any) -> int | None:
    """Return how many elements a layer keeps of each token."""
    try:
        if getattr(config, "kv_lora_rank", None) is not None:
            return int(config.kv_lora_rank + config.qk_rope_head_dim)
        if getattr(config, "v_head_dim", None) is not None:
            return None  # values of another size, and in such models heads that differ by layer
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int(2 * _key_value_heads(config, heads) * size)
    except (AttributeError, RuntimeError, TypeError):
        # no such field, or (transformers then raises a RuntimeError) one that each layer has of
        # its own
        return None


def _key_value_heads(config: Any, heads: int) -> int:
    """Return the number of key-value heads."""
    if getattr(config, "multi_query", False):
        # Falcon's newer architecture spreads them over all heads before they are kept
        return heads if getattr(config, "new_decoder_architecture", False) else 1
    return int(getattr(config, "num_key_value_heads", None) or heads)
