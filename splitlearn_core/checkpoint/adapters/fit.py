"""Which modules an adapter is for, and whether one that lies on disk fits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from splitlearn_core.checkpoint.adapters.base import AdapterBase
from splitlearn_core.checkpoint.adapters.folder import Factors, StoredAdapter
from splitlearn_core.checkpoint.adapters.layers import real_module
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed


def usual_targets(base: AdapterBase) -> list[str]:
    """Return the modules that peft knows as usual for an architecture."""
    from peft.utils.constants import (  # noqa: PLC0415 - an extra
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL,
    )

    kind = str(getattr(base.config, "model_type", None))
    usual = USUAL.get(kind)
    if usual is None:
        ends = {name.rpartition(".")[2] for name in base.linears}
        raise ValueError(
            f"peft knows no usual targets for {kind}; name some of {listed(ends)}, or 'all-linear'"
        )
    return list(usual)


def is_target(module: str, targets: Iterable[str] | str, base: AdapterBase) -> bool:
    """Whether a module is meant: by its name, or the end of it."""
    if targets == "all-linear":
        real = real_module(base.linears[module])
        return not isinstance(real, nn.Embedding) and base.linears[module] is not base.head
    names = [targets] if isinstance(targets, str) else targets
    return any(module == name or module.endswith(f".{name}") for name in names)


def check_modules(
    adapter: StoredAdapter, here: set[str], absent: set[str], base: AdapterBase
) -> None:
    """Refuse an adapter with modules that the whole model has not."""
    strangers = adapter.factors.keys() - here - absent
    if strangers:
        first = adapter.factors[min(strangers)].names[0]
        kind = getattr(base.config, "model_type", type(base).__name__)
        layers = getattr(base.config, "num_hidden_layers", "?")
        raise CheckpointError(
            f"{adapter.path} is of another model: {first}, and {len(strangers)} modules in all, are"
            f" for {min(strangers)}, which a {kind} with {layers} layers has not; load it onto the"
            " model that it was trained on"
        )


def check_fit(adapter: StoredAdapter, module: str, target: nn.Module) -> None:
    """Compare the factors' shapes with the module's."""
    factors, real = adapter.factors[module], real_module(target)
    if isinstance(real, nn.Embedding) is not factors.is_embedding:
        raise CheckpointError(
            f"{adapter.path}: {factors.names[0]} is for a table or a linear layer"
            f", and {module} is the other"
        )
    rows, columns = real.weight.shape
    if isinstance(real, nn.Embedding | Conv1D):
        rows, columns = columns, rows
    for name, found, wanted in (
        (factors.names[0], factors.a.shape, (factors.rank, columns)),
        (factors.names[1], factors.b.shape, (rows, factors.rank)),
    ):
        if tuple(found) != wanted:
            raise CheckpointError(
                f"{adapter.path}: {name} is {list(found)}, {module} of this model needs"
                f" {list(wanted)}: the adapter was trained on a model of another size"
            )


def kept_settings(adapter: StoredAdapter, own: Mapping[str, Factors]) -> dict[str, Any]:
    """Return the settings that an adapter on disk has, its ranks and scales for each module."""
    settings = adapter.settings
    scales = {module: _alpha(settings, module) for module in own}
    return {
        "r": settings["r"],
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings.get("lora_dropout") or 0.0,
        "use_rslora": bool(settings.get("use_rslora")),
        "rank_pattern": {m: f.rank for m, f in own.items() if f.rank != settings["r"]},
        "alpha_pattern": {m: a for m, a in scales.items() if a != settings["lora_alpha"]},
    }


def _alpha(settings: Mapping[str, Any], module: str) -> float:
    """Return the alpha of one module, as peft finds it."""
    from peft.utils.other import get_pattern_key  # noqa: PLC0415 - an extra

    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    return patterns.get(get_pattern_key(list(patterns), module), float(settings["lora_alpha"]))
