"""What two ranks check of every architecture: sharded parts compute what they do unsharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tiny_models import tiny_model
from torch import nn

from splitlearn_core.factory import load_component
from splitlearn_core.hidden_state import HiddenState
from splitlearn_core.sharded import load_sharded

POINTS = (2, 4)
_IDS = torch.arange(1, 11).view(2, 5)


def check_types(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong with each type, by type: nothing, as a rule."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for model_type in settings["types"]:
        path = folder / model_type
        if dist.get_rank() == 0:
            tiny_model(model_type).save_pretrained(path)
        dist.barrier()
        try:
            found[model_type] = _wrong_with(str(path))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is wrong
            found[model_type] = f"{type(error).__name__}: {error}"[:1000]
        dist.barrier()
    return found


def _wrong_with(path: str) -> str:
    """Compare each part, sharded in each way, with the part itself; train the whole one step."""
    wrong = []
    for how in ("fsdp2", "fsdp1"):
        values: Any = _IDS
        for component in ("bottom", "trunk", "top"):
            plain = load_component(path, component, POINTS)
            sharded = load_sharded(path, component, POINTS, how=how, timeout=60, device="cpu")
            with torch.no_grad():
                expected, computed = plain(values), sharded(values)
            if not _equal(expected, computed):
                wrong.append(f"{component} with {how} differs")
            values = expected
        whole = load_sharded(path, how=how, timeout=60, device="cpu")
        wrong += _wrong_in_training(whole, load_component(path, "full").model, how)
    return "; ".join(wrong)


def _wrong_in_training(sharded: nn.Module, plain: nn.Module, how: str) -> list[str]:
    """Take one step with each, and compare the losses before and after."""
    losses = []
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.is_floating_point()], lr=1e-2
        )
        before = model(_IDS, labels=_IDS, use_cache=False).loss
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = model(_IDS, labels=_IDS, use_cache=False).loss
        losses.append((before.item(), after.item()))
    (first, second), (ours, ours_after) = losses
    if first != ours or abs(second - ours_after) > 1e-5 * abs(second):
        return [f"losses with {how} are {ours}, {ours_after}, not {first}, {second}"]
    return []


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, HiddenState):
        one, other = one.tensor, other.tensor
    one, other = (getattr(value, "logits", value) for value in (one, other))
    return torch.equal(one, other)
