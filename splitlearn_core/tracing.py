"""Find out how an architecture is built by watching its own forward.

A small model of the architecture runs twice, on different tokens, with hooks on every module.  What
runs before the first layer belongs to Bottom, what runs after the last to Top.  How the layers are
called, and what they return, is noted as well; so is every value besides the hidden state that
depends on the tokens, since the parts have to send it too.  A third run, shorter and in bfloat16,
tells sizes that come from the config from those that come from the input, and fixed dtypes from
that of the weights.

The result is data: `families/certified.json` holds it for every architecture that was certified.
"""

from __future__ import annotations

import copy
import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitlearn_core.families.family import Family
from splitlearn_core.side_tracing import Sizes, find_side_values
from splitlearn_core.watching import AFTER, BEFORE, NEVER, NotAChainError, Trace, trace

__all__ = ["NotAChainError", "find_layers", "observe"]

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_POSITIONS = 7
_FEWER_POSITIONS = 3
_ROWS = 2

# transformers' name for a config's wish to have the hidden state in float32.
_FLOAT32 = "residual_in_fp32"


def observe(model: PreTrainedModel) -> Family:
    """Return how the architecture of `model` is built.

    Args:
        model: Small, with weights; it runs twice.

    Raises:
        NotAChainError: It can't be cut between its layers; says why.
    """
    path = find_layers(model)
    ids = torch.arange(_ROWS * _POSITIONS).reshape(_ROWS, _POSITIONS) % _token_count(model)
    first, second = trace(model, path, ids), trace(model, path, ids.flip(1))
    _check_order(first, len(model.get_submodule(path)))  # type: ignore[arg-type]
    hidden_argument, layer_returns = _handing_on(first)
    third = _in_bfloat16(model, path, ids[:, :_FEWER_POSITIONS])
    sizes = Sizes(model.config.get_text_config(decoder=True), ids.shape)
    side = find_side_values(first, second, third, hidden_argument, model.get_submodule(path), sizes)
    embeddings, epilogue, unused = _owners(model, path, first)
    return Family(
        layers=path,
        embeddings=embeddings,
        epilogue=epilogue,
        unused=unused,
        hidden_argument=hidden_argument,
        layer_returns=layer_returns,
        cache_argument=_cache_argument(model),
        side=side,
        **_hidden_form(first, third, hidden_argument, sizes) | _config_keys(model.config),
    )


def find_layers(model: PreTrainedModel) -> str:
    """Return the path of the list of decoder layers: the largest list of their number.

    Raises:
        NotAChainError: There is none.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    sizes: dict[str, int] = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    if not any(sizes.values()):
        raise NotAChainError(f"it has no list of {wanted} layers")
    return max(sizes, key=lambda path: sizes[path])


def _check_order(seen: Trace, count: int) -> None:
    """Refuse what does not call each layer once, in order."""
    order = [call.number for call in seen.calls]
    if order != list(range(count)):
        raise NotAChainError(f"its layers are not called once each, in order, but as {order}")


def _handing_on(seen: Trace) -> tuple[int | str, int]:
    """Return which argument of a layer is the hidden state, and the length of what it returns."""
    places: set[int | str | None] = set()
    lengths: set[int] = set()
    for before, call in pairwise(seen.calls):
        hidden = _hidden_of(before.output)
        places.add(next((k for k, v in call.arguments.items() if _is_view(v, hidden)), None))
        lengths.add(len(before.output) if isinstance(before.output, (tuple, list)) else 0)
    place = places.pop() if len(places) == 1 else None
    if place is None or len(lengths) != 1:
        raise NotAChainError("a layer is not given what the layer before it returned")
    return place, lengths.pop()


def _is_view(value: Any, hidden: torch.Tensor) -> bool:
    """Whether a value is a hidden state, or all of it seen another time."""
    if not isinstance(value, torch.Tensor) or value.shape != hidden.shape:
        return False
    return value is hidden or value.data_ptr() == hidden.data_ptr()


def _hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden state of what a layer returned."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, torch.Tensor):
        raise NotAChainError(f"a layer returns {type(output).__name__}, not a hidden state")
    return first


def _in_bfloat16(model: PreTrainedModel, path: str, ids: torch.Tensor) -> Trace | None:
    """Trace a copy of the model in bfloat16; `None` where it can't run so."""
    smaller: Any = copy.deepcopy(model)
    try:
        return trace(smaller.to(torch.bfloat16), path, ids)
    except (RuntimeError, ValueError, TypeError):
        return None


def _hidden_form(
    first: Trace, third: Trace | None, argument: int | str, sizes: Sizes
) -> dict[str, Any]:
    """Return where in the hidden state the batch is, its other sizes, and its dtype."""
    axis, rest = sizes.around(first.calls[-1].arguments[argument], "hidden state")
    last = third.calls[-1].arguments[argument].dtype if third else torch.bfloat16
    fixed = "" if last is torch.bfloat16 else str(last).removeprefix("torch.")
    return {
        "batch_axis": axis,
        "hidden_dims": tuple(sizes.name(size, "its hidden state") for size in rest),
        "hidden_dtype": fixed,
        "hidden_dtype_switch": _FLOAT32 if fixed and hasattr(sizes.config, _FLOAT32) else "",
    }


def _owners(
    model: PreTrainedModel, layers_path: str, seen: Trace
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the outermost modules with weights that run before all layers, after them, and never.

    Those that run in several phases (weights that layers share, say) are left to every part.
    """
    owners: dict[str, list[str]] = {BEFORE: [], AFTER: [], NEVER: []}
    for path, module in model.named_modules():
        around = path == "" or f"{layers_path}.".startswith(f"{path}.")
        inside = path.startswith(f"{layers_path}.")
        phase = None if around or inside else _phase_of(path, module, seen)
        if phase is None:
            continue
        known = [other for paths in owners.values() for other in paths]
        if not any(path.startswith(f"{other}.") for other in known):
            owners[phase].append(path)
    before, after, never = (_whole_lists(model, owners[phase]) for phase in (BEFORE, AFTER, NEVER))
    return before, after, never


def _whole_lists(model: PreTrainedModel, paths: list[str]) -> tuple[str, ...]:
    """Return `paths` with a list in the place of its items, where all of them are there.

    How many items it has is a matter of a model's size, not of its architecture.
    """
    for path, module in model.named_modules():
        inside = [name for name in paths if name.startswith(f"{path}.")]
        held = sum(1 for name in inside for _ in model.get_submodule(name).parameters())
        if isinstance(module, nn.ModuleList) and 0 < held == len(list(module.parameters())):
            place = paths.index(inside[0])
            paths = [name for name in paths if name not in inside]
            paths.insert(place, path)
    return tuple(paths)


def _phase_of(path: str, module: nn.Module, seen: Trace) -> str | None:
    """Return when a module with weights runs: before all layers, after them, or never.

    `None` where it has no weights of its own, or runs at several times.  Of one that never runs,
    nor anything in it, every weight is unused, however many modules a real model has in it.
    """
    inner = f"{path}."
    if not any(name == path or name.startswith(inner) for name in seen.phases):
        return NEVER if next(module.parameters(), None) is not None else None
    phases = seen.phases.get(path, {NEVER})
    phase = next(iter(phases))
    single = len(phases) == 1 and phase in {BEFORE, AFTER, NEVER}
    return phase if single and _has_own_weights(module) else None


def _cache_argument(model: PreTrainedModel) -> str:
    """Return what the forward calls its cache."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "past_key_values" not in names else "past_key_values"


def _config_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the names that `config.json` has for sizes that configs name differently."""
    decoder = config.get_text_config(decoder=True)
    renamed = decoder.attribute_map
    standard = {
        "layer_count_key": "num_hidden_layers",
        "hidden_size_key": "hidden_size",
        "max_positions_key": "max_position_embeddings",
    }
    keys = {ours: renamed.get(theirs, theirs) for ours, theirs in standard.items()}
    return keys | _listed_layers(decoder, keys["layer_count_key"])


def _listed_layers(decoder: PreTrainedConfig, key: str) -> dict[str, Any]:
    """Return the list that has an item for each layer, where `config.json` has no number of them.

    Raises:
        NotAChainError: It has neither.
    """
    stored = decoder.to_dict()
    if key in stored:
        return {}
    count = decoder.num_hidden_layers
    lists = [name for name, value in stored.items() if isinstance(value, list)]
    fitting = [name for name in lists if len(stored[name]) == count]
    if not fitting:
        raise NotAChainError("its config.json does not say how many layers it has")
    return {"layer_count_key": fitting[0]}


def _token_count(model: PreTrainedModel) -> int:
    """Return the number of token ids."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _has_own_weights(module: nn.Module) -> bool:
    """Whether a module has parameters that are not a submodule's."""
    return next(module.parameters(recurse=False), None) is not None
