"""Damage to `config.json`: fields that are absent, junk, beyond measure, or not to be obeyed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from checkpoint_fuzz.files import config_of
from checkpoint_fuzz.junk import JUNK, RAW_JSON
from checkpoint_fuzz.mutations import Damage, on
from checkpoint_fuzz.sound import LAYOUTS
from splitlearn_core.shape import CONFIG_FILE


@on(*LAYOUTS)
def config_lacks(rng: random.Random, folder: Path) -> Damage:
    path, config = config_of(folder)
    key = rng.choice(sorted(config))
    del config[key]
    path.write_text(json.dumps(config))
    return Damage(f"config.json lacks {key}")


@on(*LAYOUTS)
def config_has_junk(rng: random.Random, folder: Path) -> Damage:
    path, config = config_of(folder)
    key = rng.choice(sorted(config))
    config[key] = value = rng.choice(JUNK)
    path.write_text(json.dumps(config))
    return Damage(f"config.json: {key} is {str(value)[:40]!r}")


_SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "head_dim", "num_local_experts", "n_layer",
    "n_embd", "n_positions", "n_head", "n_inner", "num_experts_per_tok", "num_labels",
    "sliding_window",
)  # fmt: skip


@on(*LAYOUTS)
def config_is_huge(rng: random.Random, folder: Path) -> Damage:
    path, config = config_of(folder)
    key = rng.choice([*(key for key in _SIZES if key in config), "num_labels"])
    config[key] = value = rng.choice((10**5, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**20))
    path.write_text(json.dumps(config))
    layers = key in {"num_hidden_layers", "n_layer"}
    return Damage(f"config.json: {key} is {value}", refused=layers, said=(CONFIG_FILE,) * layers)


@on(*LAYOUTS)
def config_has_another_size(rng: random.Random, folder: Path) -> Damage:
    path, config = config_of(folder)
    key = rng.choice([key for key in _SIZES if key in config])
    config[key] = value = rng.choice((0, -1, 1, 2, 3, 4, 5, 7, 31, 33, 64, 96, 98))
    path.write_text(json.dumps(config))
    return Damage(f"config.json: {key} is {value}")


_EXTRAS: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
    ("auto_map", None),
    ("auto_map", []),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("quantization_config", {"quant_method": "nonsense"}),
    ("quantization_config", 3),
    ("model_type", "nonsense"),
    ("model_type", "glm_moe_dsa"),
    ("model_type", ["llama"]),
    ("model_type", "bert"),
    ("model_type", "codegen"),
    ("model_type", "mamba"),
    ("text_config", {"model_type": "llama"}),
    ("text_config", {}),
    ("text_config", 3),
    ("dtype", "float31"),
    ("dtype", "load_state_dict"),
    ("torch_dtype", "nonsense"),
    ("layer_types", ["full_attention"]),
    ("rope_scaling", {"rope_type": "nonsense"}),
    ("rope_parameters", {"rope_type": "dynamic", "factor": "x"}),
    ("architectures", "Evil"),
    ("architectures", [3]),
    ("_attn_implementation", "nonsense"),
    ("attn_implementation", "evil/kernel"),
    ("_name_or_path", "evil/model"),
    ("transformers_version", 3),
    ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", True),
    ("hidden_act", "nonsense"),
    ("hidden_act", 3),
    ("id2label", {"x": 3}),
    ("num_labels", 10**9),
    ("num_labels", -1),
    ("_commit_hash", 3),
    ("gguf_file", "x"),
    ("state_dict", {}),
    ("forward", 3),
    ("__class__", "x"),
    ("__dict__", {}),
    ("to_dict", 3),
    ("attribute_map", 3),
    ("use_cache", "x"),
    ("return_dict", False),
    ("output_hidden_states", True),
)


@on(*LAYOUTS)
def config_has_more(rng: random.Random, folder: Path) -> Damage:
    path, config = config_of(folder)
    key, value = rng.choice(_EXTRAS)
    config[key] = value
    path.write_text(json.dumps(config))
    forbidden = key in {"auto_map", "model_type", "quantization_config"}
    return Damage(f"config.json: {key} is {value!r}", refused=forbidden)


@on(*LAYOUTS)
def config_is_other_json(rng: random.Random, folder: Path) -> Damage:
    path, _ = config_of(folder)
    path.write_bytes(rng.choice(RAW_JSON))
    return Damage("config.json is something else", refused=True, said=(CONFIG_FILE,))
