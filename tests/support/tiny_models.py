"""Small models of every architecture: what some configs need besides small sizes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from splitlearn_core.small_model import LAYERS, VOCABULARY, small_config, small_model

__all__ = ["LAYERS", "NEEDS", "VOCABULARY", "causal_types", "tiny_config", "tiny_model"]

# Latent attention: as many key-value heads as heads, of the rotary width.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}

# Two kinds of attention; the last layer of each among the first four shares with the last two.
_SHARING = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}

_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
}

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

# Recurrent layers fill their input up to whole chunks, of 256 positions if nothing is said.  With
# these the few positions of a test are several chunks, and little is computed for nothing.
_CHUNK = 4

NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("minicpm3", "youtu"), _LATENT),
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1, 3, 5], "mamba_chunk_size": _CHUNK},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 3,
        "rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
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
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_chunk_size": _CHUNK},
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SHARING),
    "gemma4_unified": {"text_config": _SHARING},
    "gemma4": {
        "text_config": _SHARING,
        "vision_config": {"num_key_value_heads": 4},
        "audio_config": {},
    },
    "git": {"vision_config": {**_VISION, "image_size": 32, "patch_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 3,
        "mamba_chunk_size": _CHUNK,
    },
    "kimi_linear": {
        **_LATENT,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"] * 3,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": _CHUNK},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"] * 2,
        "mamba_num_heads": 8,
        "chunk_size": _CHUNK,
    },
    "phi4_multimodal": {
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
        "audio_config": {
            "hidden_size": 32,
            "num_blocks": 2,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 3,
        "hc_count": 5,
        "hc_lowrank": 10,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1, 5],
        "ple_embed_dim": 28,
        "ngram_size": 2,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba"] * 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "adapter_rank": 8,
        "chunk_size": _CHUNK,
    },
    "zaya": {"num_experts_per_tok": 1},
}


NEEDS["qwen4_exp"] = {"text_config": NEEDS["qwen4_exp_text"]}

# Tables of whole numbers, which are all 0 in a new model: type and name -> how many there are.
CHOICES = {("deepseek_v4", "tid2eid"): 4}


def causal_types() -> list[str]:
    """Return every type of causal language model that transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a config of this type with a few layers of small sizes."""
    return small_config(model_type, NEEDS.get(model_type))


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return a small model of this type with random weights, none of them at a special value.

    Raises:
        ValueError: It does not come out small.
    """
    model = small_model(model_type, NEEDS.get(model_type))
    for name, buffer in model.named_buffers():
        if limit := CHOICES.get((model_type, name.rpartition(".")[2])):
            buffer.random_(limit)
    return model
