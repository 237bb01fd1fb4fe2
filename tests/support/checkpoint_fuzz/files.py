"""How mutations find and rewrite the files of a checkpoint."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoint_fuzz.mutations import Damage
from splitlearn_core.headers import INDEX_FILE
from splitlearn_core.loading.sources import BIN_INDEX_FILE
from splitlearn_core.shape import CONFIG_FILE


def files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint; of the hub's cache, the blobs."""
    where = folder / "blobs" if (folder / "blobs").is_dir() else folder
    return sorted(where.iterdir())


def weights_of(folder: Path) -> list[Path]:
    """Return the files that hold tensors."""
    return [p for p in files_of(folder) if not p.read_bytes()[:1].startswith((b"{", b"["))]


def jsons_of(folder: Path) -> list[Path]:
    """Return the other files."""
    return [path for path in files_of(folder) if path not in weights_of(folder)]


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the index file, and what it holds."""
    names = (INDEX_FILE, BIN_INDEX_FILE)
    path = next(folder / name for name in names if (folder / name).exists())
    return path, json.loads(path.read_text())


def config_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return config.json, and what it holds."""
    where = folder / "snapshots" / "main" if (folder / "blobs").is_dir() else folder
    path = where / CONFIG_FILE
    return path, json.loads(path.read_text())


def shown(path: Path) -> str:
    """Return how an error may be expected to show a file: not a blob of the hub's cache."""
    return path.name if path.parent.name != "blobs" else ""


def is_needed(path: Path) -> bool:
    """Whether parts can't do without the file, or with another of the same kind."""
    return path.name != "generation_config.json"


def said_name(name: str) -> str:
    """Return what an error must say of a tensor: of single experts, the layer will do."""
    head, experts, _ = name.partition(".experts.")
    return head.rpartition(".")[0] if experts else name


def flip(rng: random.Random, path: Path, position: int) -> Damage:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    old = content[position]
    content[position] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    path.write_bytes(bytes(content))
    return Damage(f"{path.name}: byte {position} is {content[position]:#x}, not {old:#x}")


def header_length(path: Path) -> int:
    """Return what a safetensors file says of its header's length."""
    length: int = struct.unpack("<Q", path.read_bytes()[:8])[0]
    return length


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header, and the bytes after it."""
    content = path.read_bytes()
    end = 8 + header_length(path)
    return json.loads(content[8:end]), content[end:]


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Write a file as it is told, however little sense it makes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entries(header: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of tensors."""
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def pick_entry(rng: random.Random, folder: Path) -> tuple[Path, dict[str, Any], bytes, str]:
    """Choose a safetensors file, and a tensor in its header."""
    path = rng.choice(weights_of(folder))
    header, data = read_safetensors(path)
    return path, header, data, rng.choice(list(entries(header)))


def pick_tensor(rng: random.Random, folder: Path) -> tuple[Path, dict[str, torch.Tensor], str]:
    """Choose a file, and a tensor in it, to write the file anew."""
    path = rng.choice(weights_of(folder))
    is_torch = path.suffix == ".bin"
    tensors = torch.load(path, weights_only=True) if is_torch else load_file(path)
    return path, tensors, rng.choice(sorted(tensors))


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file anew, in the format that it had."""
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def leave_socket(path: Path) -> None:
    """Leave a socket; its address may be shorter than its path is."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)
