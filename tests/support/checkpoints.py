"""Fixtures: tiny checkpoints, each isolating one property."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_LAYERS = 6
VOCABULARY = 97

_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {**_ROTARY, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_ROTARY, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_ROTARY, "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {**_ROTARY, "tie_word_embeddings": True}),
    "qwen2-sliding": (
        "qwen2",
        {**_ROTARY, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": NUM_LAYERS,
            "n_head": 4,
            "n_positions": 64,
        },
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model, and the model that transformers loads from it."""

    path: Path
    model_type: str

    def unsplit(self, **kwargs: object) -> PreTrainedModel:
        """Load the whole model with transformers."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.path, **kwargs)
        return model.eval()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Return a function that writes the named checkpoint, once per kind and layout."""
    made: dict[tuple[object, ...], Checkpoint] = {}

    def make(kind: str, *, dtype: str = "float32", shard_size: str | None = None) -> Checkpoint:
        key = (kind, dtype, shard_size)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            made[key] = _write(kind, folder, dtype, shard_size)
        return made[key]

    return make


def _write(kind: str, folder: Path, dtype: str, shard_size: str | None) -> Checkpoint:
    model_type, settings = _CONFIGS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    for parameter in model.parameters():  # biases and norms too: none may be forgotten unseen
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size or "1GB")
    return Checkpoint(folder, model_type)


@pytest.fixture
def hub_named_gpt2(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> Checkpoint:
    """Return a GPT-2 named as the file on the hub: no prefix, and a mask tensor in each layer."""
    original = make_checkpoint("gpt2")
    tensors = load_file(original.path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(1, 1, 64, 64).tril()
    renamed |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(NUM_LAYERS)}
    folder = tmp_path / "gpt2-hub"
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((original.path / "config.json").read_bytes())
    return Checkpoint(folder, "gpt2")


@pytest.fixture
def damaged(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> Callable[..., Checkpoint]:
    """Return a function that copies a checkpoint with tensors dropped, added or replaced."""

    def damage(
        kind: str,
        drop: tuple[str, ...] = (),
        replace: dict[str, torch.Tensor] | None = None,
        config: dict[str, object] | None = None,
    ) -> Checkpoint:
        original = make_checkpoint(kind)
        tensors = load_file(original.path / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
        folder = tmp_path / "damaged"
        folder.mkdir()
        save_file(kept | (replace or {}), folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((original.path / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | (config or {})))
        return Checkpoint(folder, original.model_type)

    return damage
