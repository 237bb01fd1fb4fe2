"""Damage to the manifest of a saved part: what it says of the part, or of its files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from checkpoint_fuzz.mutations import Damage, on
from splitlearn_core.headers import SINGLE_FILE
from splitlearn_core.part_manifest import MANIFEST_FILE
from splitlearn_core.shape import CONFIG_FILE

# By field; a dot leads into an object.
_LIES: dict[str, tuple[Any, ...]] = {
    "format_version": (2, 0, "1", None, True, 1.0),
    "component": (None, {}, [], "trunk"),
    "component.name": ("bottom", "full", "", 3, "../x", "trunk-x"),
    "component.start_layer": (0, 2, -1, "1", 10**9, True),
    "component.end_layer": (3, 1, 10**9, 2.0),
    "component.is_first": (True, 0),
    "component.is_last": (True, None),
    "component.more": (1,),
    "model_type": ("gpt2", "nonsense", 3),
    "num_layers": (4, 10**9, "3", None),
    "num_parameters": (1, "x"),
    "dtype": ("float16", "nonsense", 3),
    "files": ({}, None, []),
    "files.../x": ({"bytes": 1, "sha256": "x"},),
    "files.absent": ({"bytes": 1, "sha256": "x"},),
    "files.config.json": (None,),
    "more": (1,),
}


@on("part")
def manifest_lies(rng: random.Random, folder: Path) -> Damage:
    key = rng.choice(list(_LIES))
    value = rng.choice(_LIES[key])
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    outer, _, inner = key.partition(".")
    if inner:
        manifest[outer][inner] = value
    else:
        manifest[outer] = value
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    said = () if outer == "files" else (MANIFEST_FILE,)
    return Damage(f"manifest: {key} is {value!r}", refused=True, said=said)


@on("part")
def manifest_lies_of_files(rng: random.Random, folder: Path) -> Damage:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    name = rng.choice((CONFIG_FILE, SINGLE_FILE))
    record = manifest["files"][name]
    way = rng.choice(("left out", "bytes", "sha256", "lacks", "more"))
    if way == "left out":
        del manifest["files"][name]
    elif way == "bytes":
        record["bytes"] = rng.choice((0, -1, record["bytes"] + 1, "9", None, 1e3, True, 2**70))
    elif way == "sha256":
        record["sha256"] = rng.choice(("", "0" * 64, None, 3, record["sha256"].upper(), "\ud800"))
    elif way == "lacks":
        del record[rng.choice(("bytes", "sha256"))]
    else:
        record["more"] = 1
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return Damage(f"manifest: {name}: {way}", refused=way != "sha256")


@on("part")
def manifest_lacks(rng: random.Random, folder: Path) -> Damage:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    place = rng.choice((manifest, manifest["component"]))
    key = rng.choice(sorted(place))
    del place[key]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return Damage(f"manifest lacks {key}", refused=True, said=(MANIFEST_FILE,))
