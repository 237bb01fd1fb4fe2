"""MiniMind's mixtures of experts as those that transformers has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from splitlearn_core.checkpoint.minimind.made import Made
from splitlearn_core.checkpoint.minimind.stored import StoredTensors
from splitlearn_core.errors import CheckpointError, UnsupportedModelError
from splitlearn_core.headers import listed

_NO_MOE = (
    "a MiniMind mixture of experts loads where transformers has an architecture that computes the"
    " same: softmax over all experts, the best {count} normalised.  This one"
)


def moe_config(
    stored: StoredTensors, told: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the config of a mixture of experts has besides, and refuse what none has."""
    experts, _ = stored.shape("model.layers.0.mlp.gate.weight")
    count = given.get("num_experts_per_tok", 1 if stored.has_norms else 2)
    normalised = given.get("norm_topk_prob", True)
    if not 0 < count <= experts:
        raise CheckpointError(f"{stored.where}: {count} of {experts} experts can't be chosen")
    if stored.has_norms:
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": experts,
            "num_experts_per_tok": count,
            "norm_topk_prob": normalised,
            "moe_intermediate_size": told["intermediate_size"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if count == 1 or not normalised:
        why = "weighs its one expert by" if count == 1 else "does not normalise"
        raise UnsupportedModelError(
            f"{stored.where}: {_NO_MOE.format(count=count)} {why} the softmax over all of them,"
            " with experts beside that every token passes: no architecture of transformers"
            " does"
        )
    return {
        "model_type": "granitemoeshared",
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": count,
        "shared_intermediate_size": told["intermediate_size"] * stored.count_shared(),
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": told["head_dim"] ** -0.5,
    }


def as_granite(
    stored: StoredTensors, plain: Mapping[str, Made], config: dict[str, Any]
) -> dict[str, Made]:
    """Return the tensors of a mixture of experts by the names that Granite MoE has."""
    tensors = {name: made for name, made in plain.items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        mlp, moe = f"{prefix}mlp.", f"{prefix}block_sparse_moe."
        experts = [f"{mlp}experts.{n}." for n in range(config["num_local_experts"])]
        shared = _shared(stored, mlp)
        tensors[f"{moe}router.weight"] = Made(((stored.at(f"{mlp}gate.weight"),),))
        both = tuple(_linears(stored, [path], "gate_proj", "up_proj") for path in experts)
        tensors[f"{moe}experts.gate_up_proj"] = Made(both, stacked=True)
        down = tuple(_linears(stored, [path], "down_proj") for path in experts)
        tensors[f"{moe}experts.down_proj"] = Made(down, stacked=True)
        if shared:
            ways = _linears(stored, shared, "gate_proj", "up_proj")
            tensors[f"{prefix}shared_mlp.input_linear.weight"] = Made((ways,))
            back = _linears(stored, shared, "down_proj")
            tensors[f"{prefix}shared_mlp.output_linear.weight"] = Made((back,), dim=1)
    used = {name for made in tensors.values() for name in made.sources}
    if left := stored.names.items() and set(stored.names.values()) - used:
        raise CheckpointError(f"{stored.where}: nothing is known of {listed(left)}")
    return tensors


def _shared(stored: StoredTensors, mlp: str) -> list[str]:
    """Return the paths of the experts that every token passes."""
    if f"{mlp}shared_experts.gate_proj.weight" in stored.names:
        return [f"{mlp}shared_experts."]
    return [f"{mlp}shared_experts.{n}." for n in range(stored.count_shared())]


def _linears(stored: StoredTensors, paths: Iterable[str], *names: str) -> tuple[str, ...]:
    """Return the stored names of some linear layers: the first of every path, and so on."""
    return tuple(stored.at(f"{path}{name}.weight") for name in names for path in paths)
