"""Torch files (`.bin`) of other things, or in another format, than a plain state dict."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint_fuzz.files import flip, pick_tensor, shown
from checkpoint_fuzz.mutations import Damage, on
from checkpoint_fuzz.sound import TORCH

_Change = Callable[[torch.Tensor], torch.Tensor]
_CHANGES: dict[str, _Change] = {
    "expanded": lambda tensor: torch.zeros(1).expand(tensor.shape),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
}


@on(*TORCH)
def torch_file_of_strange_tensors(rng: random.Random, folder: Path) -> Damage:
    path, tensors, name = pick_tensor(rng, folder)
    way = rng.choice(list(_CHANGES))
    tensors[name] = _CHANGES[way](tensors[name])
    torch.save(tensors, path)
    refused = way != "expanded"
    said = (shown(path), name) if refused else ()
    words = f"{name} is stored {way}"
    return Damage(words, refused=refused, said=said, altered=frozenset({name}))


@on(*TORCH)
def torch_file_of_other_things(rng: random.Random, folder: Path) -> Damage:
    path, tensors, name = pick_tensor(rng, folder)
    things: tuple[Any, ...] = (
        [], 3, {}, {3: tensors[name]}, {None: tensors[name]}, tensors | {3: tensors[name]},
        {"state_dict": tensors}, tensors | {"epoch": 3}, list(tensors.values()), tensors[name],
        tensors | {"x": [tensors[name]]}, tensors | {"\ud800": tensors[name]},
    )  # fmt: skip
    number = rng.randrange(len(things))
    torch.save(things[number], path)
    return Damage(f"{path.name} holds thing {number}", refused=True)


@on(*TORCH)
def torch_file_in_another_format(rng: random.Random, folder: Path) -> Damage:
    """The older format is read too; archives that must be unpacked are not."""
    path, tensors, _ = pick_tensor(rng, folder)
    way = rng.choice(("older", "older, cut off", "older, flipped", "packed", "bomb"))
    if way in {"packed", "bomb"}:
        _pack(path, padding=2**28 if way == "bomb" else 0)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    if way == "older, cut off":
        os.truncate(path, rng.randrange(path.stat().st_size))
    if way == "older, flipped":
        flip(rng, path, rng.randrange(path.stat().st_size))
    refused = way in {"older, cut off", "packed", "bomb"}
    said = (shown(path),) if refused else ()
    return Damage(f"{path.name}: {way}", refused=refused, said=said, altered=None)


def _pack(path: Path, padding: int) -> None:
    """Write a torch file's archive anew, its members compressed, zeros after the pickle."""
    packed = path.with_suffix(".packed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as member:
                member.write(old.read(entry))
                if entry.filename.endswith("/data.pkl"):
                    member.write(bytes(padding))
    packed.replace(path)
