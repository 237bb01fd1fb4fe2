"""Damage to the tensors themselves: files that are sound, of other tensors than are needed."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from checkpoint_fuzz.files import pick_tensor, said_name, save_tensors
from checkpoint_fuzz.mutations import Damage, on
from checkpoint_fuzz.sound import REWRITABLE


@on(*REWRITABLE)
def tensor_is_gone(rng: random.Random, folder: Path) -> Damage:
    path, tensors, name = pick_tensor(rng, folder)
    del tensors[name]
    save_tensors(tensors, path)
    return Damage(f"{name} left out", refused=True, said=(said_name(name),))


@on("single", "experts", "part", "bin")
def tensor_is_invented(rng: random.Random, folder: Path) -> Damage:
    path, tensors, name = pick_tensor(rng, folder)
    stem = name.rpartition(".")[0]
    new = rng.choice((f"{stem}.secret", "secret", f"{name}.1", "model.layers.9.mlp.up_proj.weight"))
    tensors[new] = torch.zeros(3)
    save_tensors(tensors, path)
    passed_over = "attn.bias" in new  # by transformers' own rule for GPT-2, wherever it stands
    return Damage(f"{new} put in", refused=not passed_over, said=(new,))


@on(*REWRITABLE)
def tensor_has_another_shape(rng: random.Random, folder: Path) -> Damage:
    path, tensors, name = pick_tensor(rng, folder)
    shape = list(tensors[name].shape)
    other = rng.choice(([*shape, 1], [shape[0] + 1, *shape[1:]], [0], [], [1], [0, 2**40]))
    tensors[name] = torch.zeros(other)
    save_tensors(tensors, path)
    words = f"{name} is {other}, not {shape}"
    return Damage(words, refused=True, said=(said_name(name),))


@on(*REWRITABLE)
def tensor_has_another_dtype(rng: random.Random, folder: Path) -> Damage:
    """Whole numbers are no weights; other floating-point dtypes may be."""
    path, tensors, name = pick_tensor(rng, folder)
    whole = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.int16)
    dtype = rng.choice((*whole, torch.float16, torch.bfloat16, torch.float64))
    tensors[name] = tensors[name].to(dtype)
    save_tensors(tensors, path)
    refused = not dtype.is_floating_point
    words = f"{name} is {dtype}"
    said = (said_name(name),) if refused else ()
    return Damage(words, refused=refused, said=said, altered=frozenset({name}))
