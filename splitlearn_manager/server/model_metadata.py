"""What a loaded model takes and gives, in the words of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

MODEL_VERSION = "1"
PLATFORM = "splitlearn_safetensors"

_DATATYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "float64": "FP64"}
_DATATYPES |= {"int64": "INT64", "int32": "INT32"}
_ANY = -1


def describe(model_id: str, model: Any) -> dict[str, Any]:
    """Return the metadata of a model: names, datatypes and shapes, -1 where they vary."""
    component = component_of(model)
    return {
        "name": model_id,
        "versions": [MODEL_VERSION],
        "platform": PLATFORM,
        "inputs": [_input(component, model), *_beside(model, "side_inputs"), _mask()],
        "outputs": [_output(component, model), *_beside(model, "side_outputs")],
        "properties": properties(model),
    }


def component_of(model: Any) -> str:
    """Return `bottom`, `trunk`, …, `full`; a model whose parts are in several places has none."""
    return getattr(model, "component", "pipeline")


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
        "device": str(model.device),
        "num_parameters": model.num_parameters(),
        "nbytes": getattr(model, "nbytes", None),
    }
    return {name: str(fact) for name, fact in facts.items() if fact is not None}


def _input(component: str, model: Any) -> dict[str, Any]:
    """Return the one positional input."""
    if component == "top" or component.startswith("trunk"):
        return _hidden_states(model)
    return {"name": "input_ids", "datatype": "INT64", "shape": [_ANY, _ANY]}


def _output(component: str, model: Any) -> dict[str, Any]:
    """Return the one output."""
    if component == "bottom" or component.startswith("trunk"):
        return _hidden_states(model)
    shape = [_ANY, _ANY, model.config.get_text_config(decoder=True).vocab_size]
    return {"name": "logits", "datatype": _DATATYPES[_dtype(model)], "shape": shape}


def _hidden_states(model: Any) -> dict[str, Any]:
    dtype = str(model.hidden_dtype).removeprefix("torch.")
    shape = [_ANY, _ANY, *model.hidden_shape]
    return {"name": "hidden_states", "datatype": _DATATYPES[dtype], "shape": shape}


def _beside(model: Any, which: str) -> list[dict[str, Any]]:
    """Return what goes with the hidden states; in frames it has codes in this order."""
    return [
        {
            "name": value.name,
            "datatype": _DATATYPES[value.dtype],
            "shape": [_ANY, _ANY, *(size.most if size.exact else _ANY for size in value.sizes)],
        }
        for value in getattr(model, which, ())
    ]


def _mask() -> dict[str, Any]:
    shape = [_ANY, _ANY]
    return {"name": "attention_mask", "datatype": "INT64", "shape": shape, "optional": True}


def _hidden_dtype(model: Any) -> str | None:
    """Return the dtype of the hidden states, where it is not that of the weights."""
    dtype = str(getattr(model, "hidden_dtype", model.dtype)).removeprefix("torch.")
    return None if dtype == _dtype(model) else dtype


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
