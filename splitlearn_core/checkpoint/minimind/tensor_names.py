"""The names of the tensors in MiniMind's files, and Hugging Face's for those of generation 1."""

from __future__ import annotations

import re
from collections.abc import Iterable

LORA_FACTOR = ".lora.A.weight"
"""How the names of an adapter's tensors end, every second one."""
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Buffers: rope tables, causal masks.
TABLES = re.compile(r"(^|\.)(freqs_cos|freqs_sin|pos_cis|freqs_cis|mask|inv_freq)$")
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")

# The names of generation 1 -> Hugging Face's.
_FIRST = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_FIRST |= {"output.weight": "lm_head.weight"}
_FIRST_IN_LAYERS = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_FIRST_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def is_minimind(names: Iterable[str]) -> bool:
    """Whether tensors have the names of one of the generations."""
    known = set(names)
    layer = {LAYER.sub(r"\2", name) for name in known}
    first = {"tok_embeddings.weight", "norm.weight"} <= known and "attention.wq.weight" in layer
    later = {TABLE, "model.norm.weight"} <= known and "self_attn.q_proj.weight" in layer
    biased = any(name.endswith(".bias") for name in known)
    return (first or later) and not biased


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name for a tensor of generation 1; any other as it is."""
    found = LAYER.fullmatch(name)
    if found is None:
        return _FIRST.get(name, name)
    rest = _FIRST_IN_LAYERS.get(found[2])
    if rest is None:
        rest = re.sub(r"^feed_forward\.", "mlp.", found[2])
        rest = re.sub(r"\.(w[123])\.weight$", lambda m: f".{_FIRST_LINEARS[m[1]]}.weight", rest)
    return f"model.layers.{found[1]}.{rest}"
