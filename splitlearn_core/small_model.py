"""A small random model of any architecture: the sizes that configs have in common, made small."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from splitlearn_core.watching import NotAChainError

LAYERS = 6
VOCABULARY = 128
MAX_PARAMETERS = 30_000_000

# No two sizes that a hidden state or a value beside it may have are equal.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "n_mamba_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_lora_rank", "mamba_d_head"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("hc_mult", "hc_count", "altup_num_inputs"), 3),
    "vocab_size": VOCABULARY,
    "word_embed_proj_dim": 64,
    "q_lora_rank": 24,
    "conv_kernel": 4,
    "sliding_window": 8,
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "router_hidden_size": 20,
    "index_topk": 5,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": VOCABULARY,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_config(model_type: str, needs: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return a config of this type with a few layers of small sizes.

    Args:
        model_type: As in `config.json`.
        needs: What this type needs besides.

    Raises:
        NotAChainError: It is an encoder-decoder.
    """
    default = CONFIG_MAPPING[model_type]()
    if getattr(default, "is_encoder_decoder", False):
        raise NotAChainError(
            "it is an encoder-decoder, no decoder-only model: its layers attend to what an encoder"
            " returned as well"
        )
    if default.get_text_config(decoder=True) is default or not default.sub_configs:
        return _shrunk(default, needs or {})
    wanted = needs or {}
    parts = {
        name: getattr(default, name) or (kind() if name in wanted else None)
        for name, kind in default.sub_configs.items()
    }
    small: dict[str, Any] = {
        name: _shrunk(part, wanted.get(name, {})).to_dict()
        for name, part in parts.items()
        if part is not None
    }
    config: PreTrainedConfig = type(default)(**small)
    return config


def _shrunk(default: PreTrainedConfig, needs: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a config of the same class with small sizes."""
    known = set(inspect.signature(type(default).__init__).parameters) | set(default.to_dict())
    renamed = default.attribute_map
    sizes = {k: v for k, v in SIZES.items() if k in known or k in renamed}
    sizes = {k: v for k, v in sizes.items() if renamed.get(k) not in sizes}
    config: PreTrainedConfig = type(default)(**sizes | dict(needs))
    return config


def small_model(model_type: str, needs: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a small model of this type with random weights, none of them at a special value.

    Float32, in evaluation mode; the same one each time.  Torch's random state is moved.

    Args:
        model_type: As in `config.json`.
        needs: What its config needs besides small sizes.

    Raises:
        ValueError: It does not come out small.
        NotAChainError: It is an encoder-decoder.
    """
    config = small_config(model_type, needs)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (size := skeleton.num_parameters()) > MAX_PARAMETERS:
        raise ValueError(f"the small model of {model_type} has {size:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for tensor in {id(t): t for t in model.state_dict().values()}.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.02)
    model.eval()
    return model
