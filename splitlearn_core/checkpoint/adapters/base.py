"""What adapters go into: a model, or what a part has of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitlearn_core.checkpoint.adapters.folder import Factors
from splitlearn_core.checkpoint.adapters.layers import (
    BASE_LAYER,
    can_have,
    factor_parameters,
    is_layer,
    names_of,
    real_module,
)
from splitlearn_core.checkpoint.models.model_state import modules_of
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.loading.minimind_files import in_halves
from splitlearn_core.messages import in_one_line
from splitlearn_core.pruning import AbsentModule

_HALF = (torch.float16, torch.bfloat16)


class AdapterBase:
    """One module that adapters go into: transformers' model, or what a part has of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        # modules that an adapter can go beside, by their names
        self.linears: dict[str, Any] = {}
        # the same of other parts
        self.absent: dict[str, nn.Module] = {}
        self._look()

    def _look(self) -> None:
        """Find the modules that an adapter can go beside."""
        self.linears, self.absent = {}, {}
        for path, within in self._module.named_modules():
            if isinstance(within, AbsentModule):
                inside = within.real.named_modules()
                found = {f"{path}.{p}".rstrip("."): m for p, m in inside if can_have(m)}
                self.absent |= found
            elif (can_have(within) or is_layer(within)) and ".base_layer" not in path:
                self.linears[path] = within
        inside_layers = tuple(f"{p}." for p, m in self.linears.items() if is_layer(m))
        self.linears = {p: m for p, m in self.linears.items() if not p.startswith(inside_layers)}

    @property
    def config(self) -> Any:
        """The whole model's config."""
        return getattr(self._module, "config", None)

    @property
    def known(self) -> Mapping[str, Any]:
        """Settings by the adapters' names."""
        found: Mapping[str, Any] = getattr(self._module, "peft_config", None) or {}
        return found

    @property
    def head(self) -> nn.Module | None:
        """The output layer, which `all-linear` leaves out."""
        find = getattr(self._module, "get_output_embeddings", None)
        return None if find is None else find()

    def layers(self) -> Iterator[Any]:
        """Yield the modules that have adapters."""
        return (module for module in self.linears.values() if is_layer(module))

    def inject(self, name: str, modules: list[str], settings: Mapping[str, Any]) -> None:
        """Put a new adapter beside some modules."""
        peft = _peft()
        own = [real_module(self.linears[module]) for module in modules]
        config = peft.LoraConfig(
            **{
                **settings,
                "target_modules": modules or ["-"],
                "fan_in_fan_out": any(isinstance(module, Conv1D) for module in own),
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": _model_name(self.config),
            }
        )
        if not modules:  # peft would refuse what has nothing to do here
            self._module.requires_grad_(False)
            self._module.peft_config = {**self.known, name: config}
            return
        before = {n: p.requires_grad for n, p in self._module.named_parameters() if "lora_" in n}
        known = self.known
        self._forget({})  # peft would warn that there will be several, which is what is wanted
        peft.inject_adapter_in_model(config, self._module, adapter_name=name)
        self._module.peft_config = {**known, name: config}
        for parameter_name, parameter in self._module.named_parameters():
            if parameter_name in before:
                parameter.requires_grad_(before[parameter_name])
        self._look()
        for layer in self.layers():
            for parameter in factor_parameters(layer, name):
                if parameter.dtype in _HALF:  # steps of training would be lost in its rounding
                    parameter.data = parameter.data.float()

    def fill(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Give an adapter its values."""
        with torch.no_grad():
            for module, stored in factors.items():
                values = (stored.a, self._turned(module, stored))
                pair = factor_parameters(self.linears[module], name)
                for parameter, value in zip(pair, values, strict=True):
                    parameter.copy_(value)

    def _turned(self, module: str, factors: Factors) -> torch.Tensor:
        """Return B, its rows sorted as those of its module were."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        kind = heads.get(module.rpartition(".")[2])
        if not factors.old_rope or kind is None:
            return factors.b
        return in_halves(factors.b, getattr(self.config, kind))

    def factors(self, name: str) -> Iterator[tuple[str, Factors]]:
        """Yield the modules that have an adapter, and its factors."""
        for path, layer in self.linears.items():
            if is_layer(layer) and (pair := factor_parameters(layer, name)):
                yield path, Factors(pair[0], pair[1], isinstance(real_module(layer), nn.Embedding))

    def settings(self, name: str, modules: list[str], *, by_their_ends: bool) -> dict[str, Any]:
        """Return what `adapter_config.json` is to hold."""
        settings: dict[str, Any] = self.known[name].to_dict()
        settings["target_modules"] = sorted(
            {m.rpartition(".")[2] for m in modules}
            if by_their_ends and self._are_all(modules)
            else modules
        )
        settings["inference_mode"] = True
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
        return {k: getattr(v, "value", v) for k, v in plain.items()}

    def _are_all(self, modules: list[str]) -> bool:
        """Whether the ends of the modules' names mean these modules of the whole, and no other."""
        ends = {module.rpartition(".")[2] for module in modules}
        names = {n for n in (*self.linears, *self.absent) if n.rpartition(".")[2] in ends}
        return names == set(modules)

    def remove(self, name: str) -> None:
        """Take an adapter away."""
        for path, layer in list(self.linears.items()):
            if not is_layer(layer):
                continue
            others = [other for other in names_of(layer) if other != name]
            layer.set_adapter(others[:1])  # peft would say which it chose
            layer.delete_adapter(name)
            if not others:
                self._put(path, real_module(layer))
        known = {other: config for other, config in self.known.items() if other != name}
        self._forget(known)

    def merge(self, names: list[str]) -> None:
        """Add adapters into the weights, and take all away."""
        for path, layer in list(self.linears.items()):
            if not is_layer(layer):
                continue
            own = [name for name in names if name in names_of(layer)]
            layer._disable_adapters = False  # noqa: SLF001 - peft merges nothing otherwise
            try:
                layer.merge(safe_merge=True, adapter_names=own)
            except ValueError as error:
                raise CheckpointError(f"{path}: {in_one_line(error)}") from error
            self._put(path, real_module(layer))
        self._forget({})

    def check_finite(self, names: list[str]) -> None:
        """Refuse to merge what would give a weight that is not finite, before any is changed."""
        for path, layer in self.linears.items():
            if not is_layer(layer):
                continue
            merged = real_module(layer).weight.detach()
            for name in names:
                if name in names_of(layer):
                    merged = merged + layer.get_delta_weight(name).detach().to(merged.dtype)
            if not torch.isfinite(merged).all():
                raise CheckpointError(
                    f"{path}: with {listed(names)} merged its weight would not be finite (NaN or"
                    " infinite), so nothing was merged; remove_lora takes the adapter away"
                )

    def check_untied(self, names: list[str]) -> None:
        """Refuse to merge into a weight that another module has as well."""
        users: dict[int, list[str]] = {}
        for path, parameter in self._module.named_parameters(remove_duplicate=False):
            users.setdefault(parameter.data_ptr(), []).append(path.replace(f".{BASE_LAYER}", ""))
        for path, layer in self.linears.items():
            if is_layer(layer) and set(names) & set(names_of(layer)):
                shared = users[real_module(layer).weight.data_ptr()]
                if len(shared) > 1:
                    raise ValueError(
                        f"{listed(shared)} are one tensor (tied): to merge the adapter of {path}"
                        " would change both; untie them first (tie_word_embeddings=False)"
                    )

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._module.get_submodule(parent), name, module)
        self.linears[path] = module

    def _forget(self, known: Mapping[str, Any]) -> None:
        if known:
            self._module.peft_config = dict(known)
        elif hasattr(self._module, "peft_config"):
            del self._module.peft_config


def _model_name(config: Any) -> str | None:
    """Return the folder or hub name that a config came from; `None` where it was made."""
    name = str(getattr(config, "name_or_path", "") or "")
    return name.removesuffix("/config.json") or None


def _peft() -> Any:
    """Import peft, or say how to get it."""
    try:
        import peft  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'splitlearn[train]'") from error
    return peft


def bases_of(model: nn.Module) -> list[AdapterBase]:
    """Return what adapters go into, in the order of the layers."""
    _peft()
    return [AdapterBase(module) for module in modules_of(model)]
