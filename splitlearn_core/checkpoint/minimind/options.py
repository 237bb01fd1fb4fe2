"""What a user may say of a MiniMind file, and whether one is meant at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitlearn_core.checkpoint.minimind.file_name import MiniMindName
from splitlearn_core.headers import listed
from splitlearn_core.messages import short

MINIMIND = "minimind"
"""What `model_type` is called."""

AUTO = "auto"

# What a user may say of a file, by the names that Hugging Face has; what the file tells besides,
# it must agree with.
OPTIONS = {
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "inference_rope_scaling",
    "intermediate_size", "max_position_embeddings", "norm_topk_prob", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
_TOKENS = {"bos_token_id", "eos_token_id"}
# Other names of the same, from MiniMind's own configs.
_SYNONYMS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings", "hidden_dim": "intermediate_size",
}  # fmt: skip
# What MiniMind's `inference_rope_scaling=True` stands for.
YARN = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048,
    "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
}  # fmt: skip


def may_be_minimind(
    file: str | None, config_type: object, model_type: str, options: Mapping[str, Any] | None
) -> bool:
    """Whether a model is one of MiniMind's, as far as can be told without its tensors.

    Args:
        file: The weights file that was named; `None` where it was a folder.
        config_type: The `model_type` in the `config.json` beside; `None` where there is none.
        model_type: What the caller says: `minimind`, or `auto`; another says that it is none.
        options: What the caller says of a MiniMind file; that there are any says that it is one.
    """
    if model_type not in {AUTO, MINIMIND}:
        return False
    if model_type == MINIMIND or options is not None or config_type == MINIMIND:
        return True
    name = None if file is None or config_type is not None else MiniMindName.parse(file)
    return name is not None and not name.is_lora


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by the names that Hugging Face has.

    Raises:
        ValueError: One is unknown, or of the wrong type.
    """
    renamed = {_SYNONYMS.get(name, name): value for name, value in options.items()}
    if unknown := renamed.keys() - OPTIONS:
        raise ValueError(
            f"minimind does not take {listed(unknown)}; it takes {', '.join(sorted(OPTIONS))}"
        )
    for name, value in renamed.items():
        if not _is_sound(name, value):
            raise ValueError(f"minimind: {name} can't be {short(value)}")
    return renamed


def _is_sound(name: str, value: object) -> bool:
    """Whether an option has a value of its kind."""
    if name in {"norm_topk_prob", "tie_word_embeddings", "inference_rope_scaling"}:
        return isinstance(value, bool)
    if name == "rope_scaling":
        return value is None or isinstance(value, Mapping)
    if name == "hidden_act":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in {"rope_theta", "rms_norm_eps"}:
        return value > 0
    return isinstance(value, int) and value >= (name not in _TOKENS)
