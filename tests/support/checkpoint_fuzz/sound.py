"""One sound checkpoint for each layout that is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core.factory import load_component
from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE
from splitlearn_core.loading.sources import BIN_INDEX_FILE
from splitlearn_core.shape import CONFIG_FILE

SPLIT = (1, 2)

SAFETENSORS = ("single", "sharded", "experts", "part", "hub-cache")
TORCH = ("bin", "bin-sharded")
INDEXED = ("sharded", "bin-sharded")
LAYOUTS = (*SAFETENSORS, *TORCH)
REWRITABLE = tuple(layout for layout in LAYOUTS if layout != "hub-cache")

_ENDS: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {
    **_ENDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {**_ENDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def make_sound(root: Path) -> None:
    """Write one sound checkpoint for each layout, in a folder that has its name."""
    llama = _model("llama", _SMALL | {"tie_word_embeddings": False})
    qwen2 = _model("qwen2", _SMALL | {"tie_word_embeddings": True})
    experts = _model("mixtral", _SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1})
    llama.save_pretrained(root / "single")
    qwen2.save_pretrained(root / "sharded", max_shard_size="30KB")
    experts.save_pretrained(root / "experts")
    load_component(root / "single", "trunk", SPLIT).save(root / "part")
    _model("gpt2", _GPT2).save_pretrained(root / "bin")
    _to_torch_files(root / "bin")
    shutil.copytree(root / "sharded", root / "bin-sharded")
    _to_torch_files(root / "bin-sharded")
    _to_hub_cache(root / "single", root / "hub-cache")


def checkpoint_folder(layout: str, folder: Path) -> Path:
    """Return the folder to load from: in the hub's cache, a snapshot."""
    return folder / "snapshots" / "main" if layout == "hub-cache" else folder


def _model(model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


def _to_torch_files(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / _torch_name(path.name))
        path.unlink()
    if (folder / INDEX_FILE).exists():
        index = json.loads((folder / INDEX_FILE).read_text())
        files = {name: _torch_name(file) for name, file in index["weight_map"].items()}
        (folder / BIN_INDEX_FILE).write_text(json.dumps(index | {"weight_map": files}))
        (folder / INDEX_FILE).unlink()


def _torch_name(name: str) -> str:
    return name.replace("model", "pytorch_model").replace(".safetensors", ".bin")


def _to_hub_cache(original: Path, folder: Path) -> None:
    """Lay files out as the hub client does: a snapshot of links to blobs."""
    snapshot = checkpoint_folder("hub-cache", folder)
    (folder / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((CONFIG_FILE, SINGLE_FILE)):
        blob = f"{number:040x}"
        shutil.copyfile(original / name, folder / "blobs" / blob)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
