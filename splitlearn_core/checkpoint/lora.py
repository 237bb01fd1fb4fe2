"""LoRA adapters on parts and whole models, through peft.

Parts keep the whole model's layer numbers, so that an adapter's names are the same on disk, on the
whole model and on each part; what changes is which of its modules are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitlearn_core.checkpoint.adapter_folder import (
    Factors,
    StoredAdapter,
    named,
    read_adapter,
    write_adapter,
)
from splitlearn_core.checkpoint.model_state import modules_of
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.errors import CheckpointError, StorageError
from splitlearn_core.headers import listed
from splitlearn_core.loading.minimind_files import in_halves
from splitlearn_core.messages import in_one_line
from splitlearn_core.pruning import AbsentModule
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os

DEFAULT = "default"
_BASE_LAYER = "base_layer"
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraReport:
    """Where an adapter is.

    Attributes:
        name: By which it is switched.
        modules: The modules that have it, sorted, by the whole model's names.
        elsewhere: Modules of it that are other parts'.
        path: The file that it was read from; `None` where it is new.
    """

    name: str
    modules: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    path: str | None = None


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Iterable[str] | str | None = None,
    dropout: float = 0.0,
    *,
    name: str = DEFAULT,
) -> LoraReport:
    """Give a model a new adapter, which computes nothing yet, and is active and trainable.

    The model's own weights are frozen.  Its change to a module is `alpha / rank * B @ A`; B is zero
    at first, and A random.

    Args:
        model: A part, a chain of parts that are all here, or transformers' model; may be wrapped.
        rank: Width between the factors.
        alpha: Scale times rank; the rank itself (scale 1) when left out.
        targets: Names of modules, or the ends of such names (`q_proj`, `mlp.up_proj`,
            `layers.3.self_attn.q_proj`); `all-linear` for every linear layer but the head; `None`
            for those that peft knows as usual for the architecture.
        dropout: Share of an input's values that the adapter does not see in training.
        name: By which it is switched.

    Raises:
        ImportError: peft is not installed.
        PackedWeightsError: (a `RuntimeError`) The weights are packed.
        ValueError: There is an adapter of that name, nothing has one of `targets`, or nothing is
            known as usual for the architecture.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be a positive whole number, found {rank!r}")
    bases = _bases(model)
    _check_new(bases, name)
    wanted = _usual_targets(bases[0]) if targets is None else targets
    chosen = [[n for n in base.linears if _is_target(n, wanted, base)] for base in bases]
    if not any(chosen):
        raise ValueError(
            f"no module here is named as {_shown(wanted)}; there are"
            f" {listed({n.rpartition('.')[2] for base in bases for n in base.linears})}"
        )
    for base, modules in zip(bases, chosen, strict=True):
        settings: dict[str, Any] = {
            "r": rank,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": dropout,
        }
        base.inject(name, modules, settings)
    set_lora(model, name, trainable=True)
    modules = [module for one in chosen for module in one]
    return LoraReport(name, tuple(sorted(modules)))


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    trainable: bool = False,
) -> LoraReport:
    """Give a model an adapter that lies on disk, and make it the active one.

    A part takes what is its own of a whole model's adapter, and the other way round: names on disk
    are always the whole model's.  Everything is compared before the model is changed.

    Args:
        model: As in `add_lora`.
        path: peft's folder, or a `.pth` file of MiniMind's `save_lora`.
        name: By which it is switched.
        trainable: Whether it goes on being trained.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no adapter.
        CheckpointError: (a `ValueError`) It is damaged, or of another architecture or size; names
            file, tensor and both shapes.
        ImportError, PackedWeightsError, ValueError: As `add_lora`.
    """
    adapter = read_adapter(path)
    bases = _bases(model)
    _check_new(bases, name)
    here = {module for base in bases for module in base.linears}
    absent = {module for base in bases for module in base.absent} - here
    _check_modules(adapter, here, absent, bases[0])
    for base in bases:
        for module in adapter.factors.keys() & base.linears.keys():
            _check_fit(adapter, module, base.linears[module])
    for base in bases:
        own = {m: f for m, f in adapter.factors.items() if m in base.linears}
        base.inject(name, sorted(own), _kept_settings(adapter, own))
        base.fill(name, own)
    set_lora(model, name, trainable=trainable)
    return LoraReport(
        name,
        tuple(sorted(adapter.factors.keys() & here)),
        tuple(sorted(adapter.factors.keys() & absent)),
        adapter.path,
    )


def save_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    dtype: torch.dtype | str | None = None,
) -> LoraReport:
    """Save an adapter, and nothing of the model, as peft's folder.

    `PeftModel.from_pretrained(model, path)` loads it onto the whole model, `load_lora` onto parts.
    What a part saves has that part's modules alone; `join_adapters` puts such folders together.

    Args:
        model: As in `add_lora`.
        path: The folder; an adapter that is there is replaced.
        name: Which adapter.
        dtype: Cast its tensors to this.

    Raises:
        KeyError: There is no adapter of that name.
        StorageError: (an `OSError`) The disk is full or failed; what was there is as it was.
        FileExistsError: The folder holds a model.
    """
    bases, wanted = _bases(model), as_dtype(dtype)
    _check_known(bases, [name])
    tensors: dict[str, torch.Tensor] = {}
    modules: list[str] = []
    for base in bases:
        for module, factors in base.factors(name):
            modules.append(module)
            tensors |= named(module, factors)
    folder = user_path(path)
    if (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds a model, which transformers would load with the adapter; name another"
            " folder"
        )
    cast = {n: t.detach().to("cpu", wanted or t.dtype).contiguous() for n, t in tensors.items()}
    is_whole = not any(base.absent for base in bases)
    settings = bases[0].settings(name, modules, by_their_ends=is_whole or len(bases) > 1)
    try:
        write_adapter(folder, settings, cast)
    except OSError as error:
        raise StorageError(
            f"the adapter can't be saved to {folder}: {in_one_line(error)}; what was there is as it"
            " was",
            error.errno,
        ) from error
    return LoraReport(name, tuple(sorted(modules)), (), str(folder))


def set_lora(
    model: nn.Module, names: str | Iterable[str] | None, *, trainable: bool | None = None
) -> None:
    """Switch adapters: those that are named are active together, and no other is.

    Args:
        model: As in `add_lora`.
        names: One or several; `None` or nothing leaves the model alone.
        trainable: Whether the active ones are trained; `None` leaves that of each as it is.

    Raises:
        KeyError: There is no adapter of one of these names.
    """
    wanted = [names] if isinstance(names, str) else list(names or ())
    bases = _bases(model)
    _check_known(bases, wanted)
    for base in bases:
        for layer in base.layers():
            asked = {p: p.requires_grad for p in layer.parameters()}
            layer.set_adapter(wanted)
            layer._disable_adapters = not wanted  # noqa: SLF001 - enable_adapters would train them
            for parameter, was in asked.items():
                parameter.requires_grad_(was)
            for name in wanted if trainable is not None else ():
                for parameter in _factor_parameters(layer, name):
                    parameter.requires_grad_(trainable is True)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Have the model without adapters for a while; the same ones are active afterwards."""
    active = active_lora(model)
    set_lora(model, None)
    try:
        yield
    finally:
        set_lora(model, active)


def lora_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, in the order in which they came."""
    return tuple(dict.fromkeys(name for base in _bases(model) for name in base.known))


def active_lora(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are active."""
    for base in _bases(model):
        for layer in base.layers():
            return () if layer.disable_adapters else tuple(layer.active_adapters)
    return ()


def remove_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Take an adapter away; the model's own weights are as they were.

    Raises:
        KeyError: There is no adapter of that name.
    """
    bases = _bases(model)
    _check_known(bases, [name])
    left = [other for other in active_lora(model) if other != name]
    for base in bases:
        base.remove(name)
    set_lora(model, left)


def merge_lora(model: nn.Module, names: str | Iterable[str] | None = None) -> tuple[str, ...]:
    """Add adapters into the model's own weights, and take all adapters away.

    The weights stay frozen, as they were beside the adapter; `save_weights` then saves the model.

    Args:
        model: As in `add_lora`.
        names: Which are merged; the active ones when left out.

    Returns:
        Those that were.

    Raises:
        KeyError: There is no adapter of one of these names.
        CheckpointError: (a `ValueError`) A merged weight would not be finite: nothing of that
            module is changed.
        ValueError: There is nothing to merge, or a module is tied to another, which would change
            with it.
    """
    bases = _bases(model)
    wanted = active_lora(model) if names is None else names
    merged = [wanted] if isinstance(wanted, str) else list(wanted)
    _check_known(bases, merged)
    if not merged:
        raise ValueError("no adapter is active here, so there is nothing to merge")
    for base in bases:
        base.check_untied(merged)
    for base in bases:
        base.merge(merged)
    return tuple(merged)


def fold_lora(model: nn.Module, path: str | os.PathLike[str]) -> LoraReport:
    """Add an adapter that lies on disk into a model's weights, which then ask for gradients again.

    Raises:
        ModelSourceError, CheckpointError, ImportError, ValueError: As `load_lora`, `merge_lora`.
    """
    report = load_lora(model, path)
    merge_lora(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return report


class _Base:
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
                found = {f"{path}.{p}".rstrip("."): m for p, m in inside if _can_have(m)}
                self.absent |= found
            elif (_can_have(within) or _is_layer(within)) and ".base_layer" not in path:
                self.linears[path] = within
        inside_layers = tuple(f"{p}." for p, m in self.linears.items() if _is_layer(m))
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
        return (module for module in self.linears.values() if _is_layer(module))

    def inject(self, name: str, modules: list[str], settings: Mapping[str, Any]) -> None:
        """Put a new adapter beside some modules."""
        peft = _peft()
        config = peft.LoraConfig(
            **{
                **settings,
                "target_modules": modules or ["-"],
                "fan_in_fan_out": any(isinstance(_real(self.linears[m]), Conv1D) for m in modules),
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
            for parameter in _factor_parameters(layer, name):
                if parameter.dtype in _HALF:  # steps of training would be lost in its rounding
                    parameter.data = parameter.data.float()

    def fill(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Give an adapter its values."""
        with torch.no_grad():
            for module, stored in factors.items():
                values = (stored.a, self._turned(module, stored))
                pair = _factor_parameters(self.linears[module], name)
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
            if _is_layer(layer) and (pair := _factor_parameters(layer, name)):
                yield path, Factors(pair[0], pair[1], isinstance(_real(layer), nn.Embedding))

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
            if not _is_layer(layer):
                continue
            others = [other for other in _names_of(layer) if other != name]
            layer.set_adapter(others[:1])  # peft would say which it chose
            layer.delete_adapter(name)
            if not others:
                self._put(path, _real(layer))
        known = {other: config for other, config in self.known.items() if other != name}
        self._forget(known)

    def merge(self, names: list[str]) -> None:
        """Add adapters into the weights, and take all away."""
        for path, layer in list(self.linears.items()):
            if not _is_layer(layer):
                continue
            own = [name for name in names if name in _names_of(layer)]
            layer._disable_adapters = False  # noqa: SLF001 - peft merges nothing otherwise
            try:
                layer.merge(safe_merge=True, adapter_names=own)
            except ValueError as error:
                raise CheckpointError(f"{path}: {in_one_line(error)}") from error
            self._put(path, _real(layer))
        self._forget({})

    def check_untied(self, names: list[str]) -> None:
        """Refuse to merge into a weight that another module has as well."""
        users: dict[int, list[str]] = {}
        for path, parameter in self._module.named_parameters(remove_duplicate=False):
            users.setdefault(parameter.data_ptr(), []).append(path.replace(f".{_BASE_LAYER}", ""))
        for path, layer in self.linears.items():
            if _is_layer(layer) and set(names) & set(_names_of(layer)):
                shared = users[_real(layer).weight.data_ptr()]
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


def _bases(model: nn.Module) -> list[_Base]:
    """Return what adapters go into, in the order of the layers."""
    _peft()
    return [_Base(module) for module in modules_of(model)]


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has adapters: it is peft's, around the model's own."""
    return hasattr(module, "lora_A") and hasattr(module, _BASE_LAYER)


def _can_have(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | nn.Embedding)


def _real(layer: nn.Module) -> Any:
    """Return the model's own module."""
    return layer.get_base_layer() if _is_layer(layer) else layer  # type: ignore[operator]


def _names_of(layer: Any) -> list[str]:
    """Return the adapters that one module has."""
    return [*layer.lora_A, *layer.lora_embedding_A]


def _factor_parameters(layer: Any, name: str) -> tuple[torch.Tensor, ...]:
    """Return A and B of an adapter; nothing where the module has none of that name."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return ()


def _usual_targets(base: _Base) -> list[str]:
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


def _is_target(module: str, targets: Iterable[str] | str, base: _Base) -> bool:
    """Whether a module is meant: by its name, or the end of it."""
    if targets == "all-linear":
        real = _real(base.linears[module])
        return not isinstance(real, nn.Embedding) and base.linears[module] is not base.head
    names = [targets] if isinstance(targets, str) else targets
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shown(targets: Iterable[str] | str) -> str:
    return targets if isinstance(targets, str) else listed(targets)


def _check_new(bases: list[_Base], name: str) -> None:
    """Refuse a name that is taken, or that can't be part of a parameter's."""
    if not name or "." in name:
        raise ValueError(f"an adapter can't be called {name!r}: no dots, and not nothing")
    if any(name in base.known for base in bases):
        raise ValueError(f"there is an adapter {name!r} already; take it away (remove_lora) first")


def _check_known(bases: list[_Base], names: Iterable[str]) -> None:
    known = {name for base in bases for name in base.known}
    if unknown := set(names) - known:
        raise KeyError(f"no adapter {listed(unknown)} here; there is {listed(known) or 'none'}")


def _check_modules(adapter: StoredAdapter, here: set[str], absent: set[str], base: _Base) -> None:
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


def _check_fit(adapter: StoredAdapter, module: str, target: nn.Module) -> None:
    """Compare the factors' shapes with the module's."""
    factors, real = adapter.factors[module], _real(target)
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


def _kept_settings(adapter: StoredAdapter, own: Mapping[str, Factors]) -> dict[str, Any]:
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
