"""Damage to a file as a whole: its bytes, its length, its being there, what lies in its place."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from pathlib import Path

from checkpoint_fuzz.files import (
    config_of,
    entries,
    files_of,
    flip,
    header_length,
    is_needed,
    jsons_of,
    leave_socket,
    read_safetensors,
    shown,
    weights_of,
)
from checkpoint_fuzz.mutations import Damage, on
from checkpoint_fuzz.sound import LAYOUTS, SAFETENSORS, TORCH

_PAGE = 4096


@on(*LAYOUTS)
def truncate_anywhere(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(files_of(folder))
    content = path.read_bytes()
    end = len(content.rstrip()) if content.startswith(b"{") else len(content)
    size = rng.randrange(end)
    os.truncate(path, size)
    words = f"{path.name} cut off at {size}"
    return Damage(words, refused=True, said=(shown(path),))


@on(*SAFETENSORS)
def flip_in_header(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    position = rng.randrange(8 + header_length(path))
    return flip(rng, path, position)


@on(*SAFETENSORS)
def flip_in_length(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    flipped = flip(rng, path, rng.randrange(8))
    return Damage(flipped.words, refused=True, said=(shown(path),))


@on(*SAFETENSORS)
def flip_in_data(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    header, data = read_safetensors(path)
    position = rng.randrange(len(data))
    ends = {entry["data_offsets"][1]: name for name, entry in entries(header).items()}
    hit = ends[min(end for end in ends if position < end)]
    flipped = flip(rng, path, 8 + header_length(path) + position)
    return Damage(f"{flipped.words}, in {hit}", altered=frozenset({hit}))


@on(*TORCH)
def flip_in_torch_file(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    flipped = flip(rng, path, rng.randrange(path.stat().st_size))
    return Damage(flipped.words, altered=None)


@on(*TORCH)
def flip_in_pickle(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(weights_of(folder))
    pickled = next(i for i in zipfile.ZipFile(path).infolist() if i.filename.endswith("/data.pkl"))
    position = pickled.header_offset + 30 + rng.randrange(pickled.file_size)
    return Damage(flip(rng, path, position).words, altered=None)


@on(*TORCH)
def flip_in_directory(rng: random.Random, folder: Path) -> Damage:
    """Of a torch file, the zip archive's directory lies at the end."""
    path = rng.choice(weights_of(folder))
    size = path.stat().st_size
    return Damage(flip(rng, path, rng.randrange(size - 2000, size)).words, altered=None)


@on(*LAYOUTS)
def flip_in_json(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(jsons_of(folder))
    return flip(rng, path, rng.randrange(path.stat().st_size))


@on(*LAYOUTS)
def splice(rng: random.Random, folder: Path) -> Damage:
    """Insert, delete, overwrite, repeat or append some bytes."""
    path = rng.choice(files_of(folder))
    content = path.read_bytes()
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 7, 8, _PAGE)))
    way = rng.choice(("insert", "delete", "zero", "repeat", "append"))
    middle = {
        "insert": rng.randbytes(end - start) + content[start:end],
        "delete": b"",
        "zero": bytes(end - start),
        "repeat": content[start:end] * 2,
        "append": content[start:end],
    }[way]
    tail = rng.randbytes(5) if way == "append" else b""
    path.write_bytes(content[:start] + middle + content[end:] + tail)
    return Damage(f"{way} of {end - start} bytes at {start} of {path.name}", altered=None)


@on(*LAYOUTS)
def file_is_gone(rng: random.Random, folder: Path) -> Damage:
    path = rng.choice(files_of(folder))
    path.unlink()
    return Damage(f"{path.name} removed", refused=is_needed(path))


@on(*LAYOUTS)
def file_is_another(rng: random.Random, folder: Path) -> Damage:
    path, other = rng.sample(files_of(folder), 2)
    path.write_bytes(other.read_bytes())
    return Damage(f"{path.name} holds what {other.name} does", refused=is_needed(path))


@on(*LAYOUTS)
def no_regular_file(rng: random.Random, folder: Path) -> Damage:
    """Put a pipe, a socket or a folder in a file's place."""
    path = rng.choice(files_of(folder))
    path.unlink()
    kind = rng.choice(("pipe", "socket", "folder"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        leave_socket(path)
    return Damage(f"{path.name} is a {kind}", refused=True, said=(shown(path),))


@on(*LAYOUTS)
def link_that_leaves(rng: random.Random, folder: Path) -> Damage:
    """Move a file out of the folder, or name a device, and link to it."""
    path = rng.choice(files_of(folder))
    outside = folder.parent / "outside"
    kind = rng.choice(("absolute", "relative", "/dev/zero", "/dev/full", "nowhere", "loop"))
    if kind in {"absolute", "relative"}:
        outside.mkdir()
        shutil.copyfile(path, outside / "file")
    targets = {
        "absolute": outside / "file",
        "relative": Path(os.path.relpath(outside / "file", path.parent)),
        "nowhere": Path("absent"),
        "loop": Path(path.name),
    }
    path.unlink()
    path.symlink_to(targets.get(kind, Path(kind)))
    return Damage(f"{path.name} is a link: {kind}", refused=True, said=(shown(path),))


@on("single", "sharded", "bin", "part")
def link_within(rng: random.Random, folder: Path) -> Damage:
    """A link that stays in the folder is sound."""
    path = rng.choice(weights_of(folder))
    path.rename(folder / "real")
    path.symlink_to("real")
    return Damage(f"{path.name} is a link to its neighbour")


@on(*LAYOUTS)
def more_files(rng: random.Random, folder: Path) -> Damage:
    """Files that a part does not need change nothing."""
    where = config_of(folder)[0].parent
    name = rng.choice(("generation_config.json", "adapter_config.json", "tokenizer.json", "x.py"))
    (where / name).unlink(missing_ok=True)
    (where / name).write_bytes(rng.choice((b"", b"{", b"[]", b'{"a": 1}', rng.randbytes(99))))
    return Damage(f"{name} added")
