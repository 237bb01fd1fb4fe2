"""What can be put into a checkpoint, and how its state is taken, checked and given back.

Checks come before anything is changed: a state that does not fit leaves all as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from splitlearn_core.checkpoint.models.wrappers import unwrapped
from splitlearn_core.checkpoint.training.sampler import ResumableSampler
from splitlearn_core.checkpoint.training.shards import is_sharded
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError, UnsavableStateError
from splitlearn_core.headers import listed
from splitlearn_core.messages import in_one_line, short

Kind = Literal["module", "adapter", "optimizer", "sampler", "generator", "stateful", "value"]

ADAPTER = "adapter"
"""The name under which a module is saved without its frozen weights."""

_SHOWN = 10


def kind_of(name: str, thing: object) -> Kind:
    """Return how a thing is saved."""
    if isinstance(thing, nn.Module):
        return "adapter" if name == ADAPTER else "module"
    if isinstance(thing, torch.optim.Optimizer):
        return "optimizer"
    if isinstance(thing, ResumableSampler):
        return "sampler"
    if isinstance(thing, torch.Generator):
        return "generator"
    if callable(getattr(thing, "state_dict", None)):
        if callable(getattr(thing, "load_state_dict", None)):
            return "stateful"
        raise UnsavableStateError(
            f"{name} ({type(thing).__qualname__}) has a state_dict() and no load_state_dict(): its"
            " state could not be given back"
        )
    return "value"


def state_of(name: str, thing: Any) -> Any:
    """Return the state of a thing; tensors in it are its own, not copies."""
    kind = kind_of(name, thing)
    if kind == "value":
        return thing
    if kind == "generator":
        return thing.get_state()
    if kind == "module":
        return unwrapped(thing).state_dict()
    if kind == "adapter":
        return _adapter_state(unwrapped(thing))
    if kind == "optimizer":
        return {"state": thing.state_dict(), "parameters": _parameters(thing)}
    return thing.state_dict()


def class_of(thing: object) -> str:
    """Return what a thing is, for messages, and to compare."""
    kind = type(unwrapped(thing) if isinstance(thing, nn.Module) else thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def check(name: str, thing: Any, state: Any, saved_class: str, where: str) -> None:
    """Refuse a state that does not fit, as far as that can be told before it is given.

    Args:
        name: What it was saved as.
        thing: What is to have it.
        state: What `state_of` returned.
        saved_class: What `class_of` returned.
        where: The checkpoint, for errors.

    Raises:
        CheckpointError: (a `ValueError`) It does not fit; says what differs.
    """
    kind = kind_of(name, thing)
    if is_sharded(thing):
        raise CheckpointError(
            f"{where}: {name} was saved whole, and this one is shared out over ranks: load it"
            " before it is sharded, or save a sharded one"
        )
    try:
        if kind == "module":
            _check_tensors(name, dict(unwrapped(thing).state_dict()), state, where)
        elif kind == "adapter":
            _check_tensors(name, _adapter_state(unwrapped(thing)), state, where)
        elif kind == "optimizer":
            _check_optimizer(name, thing, state, saved_class, where)
        elif kind in {"stateful", "sampler"} and saved_class != class_of(thing):
            raise CheckpointError(
                f"{where}: {name} was saved by a {saved_class}, and this is a {class_of(thing)}"
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: what was saved as {name} is no state of a {class_of(thing)}:"
            f" {in_one_line(error)}"
        ) from error


def give(name: str, thing: Any, state: Any) -> None:
    """Give a thing the state that was checked."""
    kind = kind_of(name, thing)
    if kind == "generator":
        thing.set_state(state)
    elif kind == "module":
        unwrapped(thing).load_state_dict(state)
    elif kind == "adapter":
        unwrapped(thing).load_state_dict(state, strict=False)
    elif kind == "optimizer":
        _give_optimizer(thing, state["state"])
    else:
        thing.load_state_dict(state)


@contextmanager
def unchanged_if_raised(things: Mapping[str, Any]) -> Iterator[None]:
    """Give things their present state back if the block raises; for small ones: it is copied."""
    before = {name: copy.deepcopy(state_of(name, thing)) for name, thing in things.items()}
    try:
        yield
    except BaseException:
        for name, thing in things.items():
            give(name, thing, before[name])
        raise


# --- Modules -----------------------------------------------------------------------------------


def _adapter_state(module: nn.Module) -> dict[str, Any]:
    """Return what is trained of a module, all LoRA weights, and its buffers."""
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not (parameter.requires_grad or "lora_" in name)
    }
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _check_tensors(
    name: str, mine: Mapping[str, Any], saved: Mapping[str, Any], where: str
) -> None:
    """Compare two state dicts by names, shapes and dtypes."""
    wrong = []
    if missing := mine.keys() - saved.keys():
        wrong.append(f"not in the checkpoint: {listed(missing, _SHOWN)}")
    if unknown := saved.keys() - mine.keys():
        wrong.append(f"not in the {name} here: {listed(unknown, _SHOWN)}")
    differing = [
        f"{key} is {_described(saved[key])} in the checkpoint and {_described(mine[key])} here"
        for key in sorted(mine.keys() & saved.keys())
        if _described(mine[key]) != _described(saved[key])
    ]
    wrong += differing[:_SHOWN]
    if len(differing) > _SHOWN:
        wrong.append(f"{len(differing) - _SHOWN} more differ so")
    if wrong:
        raise CheckpointError(
            f"{where} is not of this {name}: {'; '.join(wrong)}.  Build it as it was when it was"
            " saved, or name the checkpoint that is of this one"
        )


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)} {list(value.shape)}"


# --- Optimizers --------------------------------------------------------------------------------


def _parameters(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    """Return the shapes of the parameters of each group."""
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _check_optimizer(
    name: str, optimizer: torch.optim.Optimizer, state: Any, saved_class: str, where: str
) -> None:
    if saved_class != class_of(optimizer):
        raise CheckpointError(
            f"{where}: {name} was saved by a {saved_class}, and this is a {class_of(optimizer)}:"
            " its state means nothing to it"
        )
    saved, mine = state["parameters"], _parameters(optimizer)
    lengths = [len(group) for group in saved], [len(group) for group in mine]
    if lengths[0] != lengths[1]:
        raise CheckpointError(
            f"{where}: {name} was saved with groups of {short(lengths[0])} parameters, and this one"
            f" has groups of {short(lengths[1])}: make it with the groups that it had"
        )
    for number, (theirs, ours) in enumerate(zip(saved, mine, strict=True)):
        for place, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            if one != other:
                raise CheckpointError(
                    f"{where}: {name}: parameter {place} of group {number} was {one} when it was"
                    f" saved, and is {other} here: give the parameters in the order that they had"
                )


def _give_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, in the dtypes that it had.

    torch casts what it holds of a parameter to the parameter's dtype, which would lose bits of
    float32 moments of bfloat16 weights.
    """
    optimizer.load_state_dict(state)
    numbers = (n for group in state["param_groups"] for n in group["params"])
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for number, parameter in zip(numbers, parameters, strict=True):
        held = optimizer.state.get(parameter, {})
        for key, saved in state["state"].get(number, {}).items():
            now = held.get(key)
            if isinstance(now, torch.Tensor) and now.dtype != saved.dtype:
                held[key] = saved.to(now.device)
