"""What a loaded model takes and gives, in the words of the Open Inference Protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitlearn_manager.serving.signature import Signature, component_of

if TYPE_CHECKING:
    from splitlearn_manager.serving.signature import Slot

MODEL_VERSION = "1"
PLATFORM = "splitlearn_safetensors"
BACKEND = "splitlearn"


def describe(model_id: str, model: Any) -> dict[str, Any]:
    """Return the metadata of a model: names, datatypes and shapes, -1 where they vary.

    What goes with the hidden states has its code in frames of sessions by its place here.
    """
    signature = Signature.of(model)
    return {
        "name": model_id,
        "versions": [MODEL_VERSION],
        "platform": PLATFORM,
        "inputs": list(map(_described, signature.inputs)),
        "outputs": list(map(_described, signature.outputs)),
        "properties": properties(model),
    }


def describe_config(model_id: str, model: Any) -> dict[str, Any]:
    """Return a model's configuration as Triton has it, as far as it says something here.

    Batches are the first size of every tensor, which Triton calls a `max_batch_size` of 0: its
    server adds no size of its own.
    """
    signature = Signature.of(model)
    return {
        "name": model_id,
        "platform": PLATFORM,
        "backend": BACKEND,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": list(map(_configured, signature.inputs)),
        "output": list(map(_configured, signature.outputs)),
    }


def properties(model: Any) -> dict[str, str]:
    """Return the facts that a client checks before it relies on a model, all of them as text."""
    facts = {
        "component": component_of(model),
        "model_type": model.config.model_type,
        "start_layer": getattr(model, "start_layer", None),
        "end_layer": getattr(model, "end_layer", None),
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "hidden_dtype": _hidden_dtype(model),
        "layerwise": ",".join(v.name for v in getattr(model, "side_inputs", ()) if v.layerwise)
        or None,
        "max_positions": model.max_positions,
        "rolls_back": getattr(model, "rolls_back", None),
        "dtype": _dtype(model),
        "quantization": getattr(model, "quantization", None),
        "device": str(model.device),
        "num_parameters": model.num_parameters(),
        "nbytes": getattr(model, "nbytes", None),
    }
    return {name: str(fact) for name, fact in facts.items() if fact is not None}


def _described(slot: Slot) -> dict[str, Any]:
    entry = {"name": slot.name, "datatype": slot.datatype, "shape": slot.shape}
    return entry | ({"optional": True} if slot.optional else {})


def _configured(slot: Slot) -> dict[str, Any]:
    entry = {"name": slot.name, "data_type": f"TYPE_{slot.datatype}", "dims": slot.shape}
    return entry | ({"optional": True} if slot.optional else {})


def _hidden_dtype(model: Any) -> str | None:
    """Return the dtype of the hidden states, where it is not that of the weights."""
    dtype = str(getattr(model, "hidden_dtype", model.dtype)).removeprefix("torch.")
    return None if dtype == _dtype(model) else dtype


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
