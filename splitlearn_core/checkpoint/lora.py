"""LoRA adapters on parts and whole models, through peft.

Parts keep the whole model's layer numbers, so that an adapter's names are the same on disk, on the
whole model and on each part; what changes is which of its modules are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from splitlearn_core.checkpoint.adapters.base import AdapterBase, bases_of
from splitlearn_core.checkpoint.adapters.fit import (
    check_fit,
    check_modules,
    is_target,
    kept_settings,
    usual_targets,
)
from splitlearn_core.checkpoint.adapters.folder import named, read_adapter, write_adapter
from splitlearn_core.checkpoint.adapters.layers import factor_parameters
from splitlearn_core.dtypes import as_dtype
from splitlearn_core.errors import StorageError
from splitlearn_core.headers import listed
from splitlearn_core.messages import in_one_line
from splitlearn_core.user_paths import user_path

if TYPE_CHECKING:
    import os

DEFAULT = "default"


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
    bases = bases_of(model)
    _check_new(bases, name)
    wanted = usual_targets(bases[0]) if targets is None else targets
    chosen = [[n for n in base.linears if is_target(n, wanted, base)] for base in bases]
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
    bases = bases_of(model)
    _check_new(bases, name)
    here = {module for base in bases for module in base.linears}
    absent = {module for base in bases for module in base.absent} - here
    check_modules(adapter, here, absent, bases[0])
    for base in bases:
        for module in adapter.factors.keys() & base.linears.keys():
            check_fit(adapter, module, base.linears[module])
    for base in bases:
        own = {m: f for m, f in adapter.factors.items() if m in base.linears}
        base.inject(name, sorted(own), kept_settings(adapter, own))
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
    bases, wanted = bases_of(model), as_dtype(dtype)
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
    bases = bases_of(model)
    _check_known(bases, wanted)
    for base in bases:
        for layer in base.layers():
            asked = {p: p.requires_grad for p in layer.parameters()}
            layer.set_adapter(wanted)
            layer._disable_adapters = not wanted  # noqa: SLF001 - enable_adapters would train them
            for parameter, was in asked.items():
                parameter.requires_grad_(was)
            for name in wanted if trainable is not None else ():
                for parameter in factor_parameters(layer, name):
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
    return tuple(dict.fromkeys(name for base in bases_of(model) for name in base.known))


def active_lora(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are active."""
    for base in bases_of(model):
        for layer in base.layers():
            return () if layer.disable_adapters else tuple(layer.active_adapters)
    return ()


def remove_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Take an adapter away; the model's own weights are as they were.

    Raises:
        KeyError: There is no adapter of that name.
    """
    bases = bases_of(model)
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
        CheckpointError: (a `ValueError`) A merged weight would not be finite; nothing is changed.
        ValueError: There is nothing to merge, or a module is tied to another, which would change
            with it.
    """
    bases = bases_of(model)
    wanted = active_lora(model) if names is None else names
    merged = [wanted] if isinstance(wanted, str) else list(wanted)
    _check_known(bases, merged)
    if not merged:
        raise ValueError("no adapter is active here, so there is nothing to merge")
    for base in bases:
        base.check_untied(merged)
        base.check_finite(merged)
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


def _shown(targets: Iterable[str] | str) -> str:
    return targets if isinstance(targets, str) else listed(targets)


def _check_new(bases: list[AdapterBase], name: str) -> None:
    """Refuse a name that is taken, or that can't be part of a parameter's."""
    if not name or "." in name:
        raise ValueError(f"an adapter can't be called {name!r}: no dots, and not nothing")
    if any(name in base.known for base in bases):
        raise ValueError(f"there is an adapter {name!r} already; take it away (remove_lora) first")


def _check_known(bases: list[AdapterBase], names: Iterable[str]) -> None:
    known = {name for base in bases for name in base.known}
    if unknown := set(names) - known:
        raise KeyError(f"no adapter {listed(unknown)} here; there is {listed(known) or 'none'}")
