"""Damage to the header of a safetensors file: what it says is not what there is."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from checkpoint_fuzz.files import (
    entries,
    header_length,
    pick_entry,
    read_safetensors,
    said_name,
    shown,
    weights_of,
    write_safetensors,
)
from checkpoint_fuzz.junk import JUNK, NAMES, RAW_JSON
from checkpoint_fuzz.mutations import Damage, on
from checkpoint_fuzz.sound import SAFETENSORS


@on(*SAFETENSORS)
def length_lies(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    true = header_length(path)
    size = path.stat().st_size
    huge = (2**25 + 1, 100_000_001, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
    length = rng.choice((0, 1, true - 8, true - 1, true + 1, true + 8, size - 8, size, *huge))
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return Damage(f"{path.name} says its header has {length}", refused=True, said=(shown(path),))


def _lying_offsets(a: int, b: int, end: int) -> tuple[Any, ...]:
    """Return what may be said of a tensor that lies at [a, b) of data that end at `end`."""
    huge = (2**63, 2**64, 10**4000)
    return (
        [a - 4, b - 4],
        [a + 4, b + 4],
        [b, a],
        [a, b + 4],
        [a + 4, b],
        [end, end + b - a],
        [-(b - a), 0],
        [a - b, a - b],
        *([a + far, b + far] for far in huge),
        [float(a), float(b)],
        [str(a), str(b)],
        [a, b, b],
        [a],
        None,
    )


@on(*SAFETENSORS)
def offsets_lie(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    entry = header[name]
    entry["data_offsets"] = rng.choice(_lying_offsets(*entry["data_offsets"], len(data)))
    write_safetensors(path, header, data)
    words = f"{name} has the offsets {str(entry['data_offsets'])[:60]}"
    return Damage(words, refused=True, said=(shown(path),))


@on(*SAFETENSORS)
def offsets_swapped(rng: random.Random, folder: Path) -> Damage:
    """Two tensors of one size have each other's bytes: nothing shows it but a hash."""
    path, header, data, name = pick_entry(rng, folder)
    size = [header[name]["dtype"], header[name]["shape"]]
    other = rng.choice([n for n, e in entries(header).items() if [e["dtype"], e["shape"]] == size])
    ours, theirs = header[name], header[other]
    ours["data_offsets"], theirs["data_offsets"] = theirs["data_offsets"], ours["data_offsets"]
    write_safetensors(path, header, data)
    return Damage(f"{name} and {other} have changed places", altered=frozenset({name, other}))


@on(*SAFETENSORS)
def offsets_shared(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    other = rng.choice([n for n in entries(header) if n != name])
    header[name]["data_offsets"] = header[other]["data_offsets"]
    write_safetensors(path, header, data)
    return Damage(f"{name} lies where {other} does", refused=True, said=(shown(path),))


def _lying_shapes(first: int, *others: int) -> tuple[Any, ...]:
    """Return what may be said of a tensor's shape."""
    return (
        [first, *others, 2],
        [first + 1, *others],
        [first - 1, *others],
        [-first, *others],
        [-1, -first, *others],
        [2**62, 4, first, *others],
        [2**64, first, *others],
        [0, 2**64],
        [float(first), *others],
        [str(first), *others],
        [True, first, *others],
        [[first, *others]],
        [],
        first,
        None,
        [10**4000] * 2000,
        [1] * 100_000,
    )


@on(*SAFETENSORS)
def shape_lies(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    header[name]["shape"] = shape = rng.choice(_lying_shapes(*header[name]["shape"]))
    write_safetensors(path, header, data)
    words = f"{name} has the shape {str(shape)[:60]}"
    return Damage(words, refused=True, said=(shown(path), name))


@on(*SAFETENSORS)
def shape_turned(rng: random.Random, folder: Path) -> Damage:
    """As many elements, in another order or number of dimensions."""
    path, header, data, name = pick_entry(rng, folder)
    shape = header[name]["shape"]
    header[name]["shape"] = turned = rng.choice(([1, *shape], [*shape, 1], [1] * 65 + shape))
    write_safetensors(path, header, data)
    words = f"{name} has {len(turned)} dimensions"
    return Damage(words, refused=True, said=(said_name(name),))


@on(*SAFETENSORS)
def dtype_lies(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    strange = ("F31", "f32", "", "F64", "F16", "BF16", "I32", "U32", "C64", "F4", None, 3, ["F32"])
    header[name]["dtype"] = dtype = rng.choice(strange)
    write_safetensors(path, header, data)
    return Damage(f"{name} has the dtype {dtype}", refused=True, said=(said_name(name),))


@on(*SAFETENSORS)
def strange_name(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    header[rng.choice(NAMES)] = header.pop(name)
    write_safetensors(path, header, data)
    return Damage(f"{name} has a strange name", refused=True)


@on(*SAFETENSORS)
def name_twice(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    text = json.dumps(header)
    again = json.dumps({name: header[name]})[1:]
    write_safetensors(path, (text[:-1] + ", " + again).encode(), data)
    return Damage(f"{name} is there twice", refused=True, said=(shown(path), name))


@on(*SAFETENSORS)
def header_is_other_json(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    text = rng.choice(RAW_JSON)
    path.write_bytes(struct.pack("<Q", len(text)) + text + read_safetensors(path)[1])
    return Damage(f"the header of {path.name} is {text[:20]!r}", refused=True, said=(shown(path),))


@on(*SAFETENSORS)
def entry_is_other_json(rng: random.Random, folder: Path) -> Damage:
    path, header, data, name = pick_entry(rng, folder)
    if rng.random() < 0.5:
        header[name] = rng.choice(JUNK)
    else:
        header[name].pop(rng.choice(("dtype", "shape", "data_offsets")))
    write_safetensors(path, header, data)
    return Damage(f"the entry of {name} is junk", refused=True, said=(shown(path), name))


@on(*SAFETENSORS)
def metadata_is_junk(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    header, data = read_safetensors(path)
    header["__metadata__"] = rng.choice((*JUNK, {"format": "tf"}, {"format": 3}, {"a": {"b": "c"}}))
    if rng.random() < 0.2:
        del header["__metadata__"]
    write_safetensors(path, header, data)
    return Damage(f"the metadata of {path.name} are junk")
