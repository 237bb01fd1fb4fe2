"""Small models of every architecture: the sizes that configs have in common, and what some need."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 6
VOCABULARY = 128
MAX_PARAMETERS = 30_000_000

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
    "vocab_size": VOCABULARY,
    "word_embed_proj_dim": 64,
    "q_lora_rank": 24,
    "conv_kernel": 4,
    "sliding_window": 8,
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Latent attention: as many key-value heads as heads, of the rotary width.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("minicpm3", "youtu"), _LATENT),
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1, 3, 5]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 3,
        "rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "per_layer_config": {},
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "shared_experts_intermediate_size": 32,
        "rope_parameters": {
            "indexed_attention": {**_ROTARY, "partial_rotary_factor": 0.25},
            "sliding_attention": {**_ROTARY, "partial_rotary_factor": 0.25},
        },
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "kimi_linear": {
        **_LATENT,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"] * 3,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> list[str]:
    """Return every type of causal language model that transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config of this type with a few layers of small sizes."""
    default = CONFIG_MAPPING[model_type]()
    if default.get_text_config(decoder=True) is default:
        return _shrunk(default, NEEDS.get(model_type, {}))
    parts = {name: getattr(default, name) for name in default.sub_configs}
    small = {name: _shrunk(part, {}).to_dict() for name, part in parts.items() if part is not None}
    config: PreTrainedConfig = type(default)(**small)
    return config


def _shrunk(default: PreTrainedConfig, needs: dict[str, Any]) -> PreTrainedConfig:
    """Return a config of the same class with small sizes."""
    known = set(inspect.signature(type(default).__init__).parameters) | set(default.to_dict())
    renamed = default.attribute_map
    sizes = {k: v for k, v in SIZES.items() if k in known or k in renamed}
    sizes = {k: v for k, v in sizes.items() if renamed.get(k) not in sizes}
    config: PreTrainedConfig = type(default)(**sizes | needs)
    return config


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return a small model of this type with random weights, none of them at a special value.

    Raises:
        ValueError: It does not come out small.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (size := skeleton.num_parameters()) > MAX_PARAMETERS:
        raise ValueError(f"the small model of {model_type} has {size:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()
