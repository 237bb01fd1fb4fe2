"""Damage to the index of a sharded checkpoint, and shards that are not what it says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from checkpoint_fuzz.files import index_of, weights_of
from checkpoint_fuzz.junk import JUNK, NAMES, RAW_JSON
from checkpoint_fuzz.mutations import Damage, on
from checkpoint_fuzz.sound import INDEXED


@on(*INDEXED)
def index_is_other_json(rng: random.Random, folder: Path) -> Damage:
    path, index = index_of(folder)
    way = rng.choice(("no map", "empty", "junk", "raw", "whole"))
    if way == "no map":
        del index["weight_map"]
    elif way in {"empty", "junk"}:
        index["weight_map"] = {} if way == "empty" else rng.choice(JUNK)
    text = rng.choice(RAW_JSON) if way == "raw" else json.dumps(index).encode()
    path.write_bytes(json.dumps(rng.choice(JUNK)).encode() if way == "whole" else text)
    # a sound map of other tensors: what is missing is said, and not where it should have been named
    sound = way == "junk" and index["weight_map"] == {"rope_type": "yarn"}
    return Damage(f"the index: {way}", refused=True, said=() if sound else (path.name,))


_FILES = (
    "absent.safetensors", "../x", "/etc/passwd", "..", ".", "", "a\0b", "x" * 300, "\ud800",
    "a/b", "a\\..\\b", "config.json", 3, None, ["model"], {},
)  # fmt: skip


@on(*INDEXED)
def index_names_another_file(rng: random.Random, folder: Path) -> Damage:
    path, index, name = _pick(rng, folder)
    index["weight_map"][name] = file = rng.choice(_FILES)
    path.write_text(json.dumps(index))
    return Damage(f"{name} is said to lie in {str(file)[:30]!r}", refused=True)


@on(*INDEXED)
def index_names_another_shard(rng: random.Random, folder: Path) -> Damage:
    path, index, name = _pick(rng, folder)
    files = sorted(set(index["weight_map"].values()) - {index["weight_map"][name]})
    index["weight_map"][name] = rng.choice(files)
    path.write_text(json.dumps(index))
    return Damage(f"{name} is said to lie in another", refused=True, said=(name,))


@on(*INDEXED)
def index_omits(rng: random.Random, folder: Path) -> Damage:
    path, index, name = _pick(rng, folder)
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    return Damage(f"the index lacks {name}", refused=True, said=(name,))


@on(*INDEXED)
def index_invents(rng: random.Random, folder: Path) -> Damage:
    path, index, name = _pick(rng, folder)
    new = rng.choice((f"{name}.secret", "model.layers.7.mlp.up_proj.weight", *NAMES[:6]))
    index["weight_map"][new] = index["weight_map"][name]
    path.write_text(json.dumps(index))
    return Damage(f"the index invents {new[:40]!r}", refused=True)


@on(*INDEXED)
def index_names_twice(rng: random.Random, folder: Path) -> Damage:
    path, index, name = _pick(rng, folder)
    again = json.dumps({name: index["weight_map"][name]})[1:-1]
    text = path.read_text().replace('"weight_map": {', '"weight_map": {' + again + ",")
    path.write_text(text)
    return Damage(f"the index names {name} twice", refused=True, said=(path.name, name))


@on(*INDEXED)
def shards_swapped(rng: random.Random, folder: Path) -> Damage:
    one, other = rng.sample(weights_of(folder), 2)
    one.rename(folder / "third")
    other.rename(one)
    (folder / "third").rename(other)
    return Damage(f"{one.name} and {other.name} have changed places", refused=True)


def _pick(rng: random.Random, folder: Path) -> tuple[Path, dict[str, Any], str]:
    """Choose a tensor in the index."""
    path, index = index_of(folder)
    return path, index, rng.choice(sorted(index["weight_map"]))
