"""Checkpoints of real models' shapes with random weights, made where the benchmark runs.

Norms are 1, biases 0, everything else is cut from one pool of N(0, 0.02) numbers: numerically well
behaved, not trained.  Peak memory while writing: one tensor, and the pool.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from splitlearn_core.headers import INDEX_FILE, SINGLE_FILE
from splitlearn_core.skeleton import build_skeleton
from splitlearn_core.tensor_writer import TensorSpec, write_tensors

logger = logging.getLogger(__name__)

DTYPE = torch.bfloat16
_RECORD_FILE = "bench.json"
_POOL_ELEMENTS = 16 * 1024 * 1024
_DEVIATION = 0.02

_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Of mixtures of experts only the names matter here, so the tensors are small.
_EXPERTS: dict[str, Any] = {
    **_TINY,
    "hidden_size": 32,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Shape:
    """A model's architecture and sizes, as `config.json` has them."""

    name: str
    model_type: str
    settings: Mapping[str, Any]


QWEN2_TINY = Shape("qwen2-tiny", "qwen2", _TINY)
QWEN2_0_5B = Shape(
    "qwen2-0.5b",
    "qwen2",
    {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
)
# Layers as Qwen2-0.5B has them, of its 24 a few, and no vocabulary to speak of: for a Trunk.
QWEN2_0_5B_LAYERS = Shape(
    "qwen2-0.5b-layers",
    "qwen2",
    {
        "vocab_size": 512,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 10,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
)
QWEN2_1_5B = Shape(
    "qwen2-1.5b",
    "qwen2",
    {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
)
QWEN2_7B = Shape(
    "qwen2-7b",
    "qwen2",
    {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
)
EXPERTS_TINY = Shape("experts-tiny", "qwen3_moe", {**_EXPERTS, "num_experts": 8})
EXPERTS_512 = Shape(
    "experts-512", "qwen3_moe", {**_EXPERTS, "num_experts": 512, "num_hidden_layers": 65}
)


@dataclass(frozen=True)
class BenchCheckpoint:
    """A checkpoint to make, or made already.

    Attributes:
        shape: Of which model.
        shards: Number of weights files; one is `model.safetensors`, without an index.
        work_dir: The folder that holds its folder.
    """

    shape: Shape
    shards: int
    work_dir: Path = field(compare=False)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.work_dir / f"{self.shape.name}-{self.shards}"

    @property
    def files(self) -> list[Path]:
        """The weights files that are there, in order."""
        return sorted(self.folder.glob("*.safetensors"))

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor, by the name that a published checkpoint has for it."""
        return dict(_published(build_skeleton(self._config())))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    def is_made(self) -> bool:
        """Whether it is there, complete, and of this very shape."""
        record = self.folder / _RECORD_FILE
        return record.is_file() and json.loads(record.read_text(encoding="utf-8")) == self._record()

    def make(self) -> None:
        """Write it, unless it is there; it appears under its name when it is complete."""
        if self.is_made():
            return
        logger.info("making %s (%.1f GB)", self.folder, self.nbytes / 1e9)
        unfinished = self.folder.with_name(f".{self.folder.name}.unfinished")
        for leftover in (unfinished, self.folder):
            if leftover.is_dir():
                shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        self._write(unfinished)
        unfinished.rename(self.folder)

    def _write(self, folder: Path) -> None:
        """Write config, weights, and what they were made from."""
        config = self._config()
        config.architectures = [type(build_skeleton(config)).__name__]
        config.dtype = DTYPE
        config.save_pretrained(folder)
        weight_map: dict[str, str] = {}
        pool = _Pool()
        for file, names in self._shards().items():
            specs = {name: self.tensors[name] for name in names}
            write_tensors(folder / file, specs, lambda name: pool.fill(name, self.tensors[name]))
            weight_map |= dict.fromkeys(names, file)
        if self.shards > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
        (folder / _RECORD_FILE).write_text(json.dumps(self._record()), encoding="utf-8")

    def _shards(self) -> dict[str, list[str]]:
        """Return the weights files with their tensors: equal shares, in the model's order."""
        if self.shards == 1:
            return {SINGLE_FILE: list(self.tensors)}
        shards: dict[str, list[str]] = {}
        position = 0
        for name, spec in self.tensors.items():
            number = position * self.shards // self.nbytes + 1
            file = f"model-{number:05}-of-{self.shards:05}.safetensors"
            shards.setdefault(file, []).append(name)
            position += spec.nbytes
        return shards

    def _config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = AutoConfig.for_model(
            self.shape.model_type, **self.shape.settings
        )
        return config

    def _record(self) -> dict[str, Any]:
        return {**asdict(self.shape), "shards": self.shards}


def _published(model: Any) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors of a model as they are published: tied ones once, experts one by one."""
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        prefix, dot, last = name.rpartition(".experts.")
        if dot:
            yield from _single_experts(f"{prefix}.experts", last, tuple(tensor.shape))
        else:
            yield name, TensorSpec(DTYPE, tuple(tensor.shape))


def _single_experts(
    prefix: str, fused: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the published tensors of a fused one [experts, …]: gate_up_proj holds two of each."""
    experts, rows, columns = shape
    pair = fused == "gate_up_proj"
    names = ("gate_proj", "up_proj") if pair else (fused,)
    spec = TensorSpec(DTYPE, (rows // len(names), columns))
    for number in range(experts):
        for name in names:
            yield f"{prefix}.{number}.{name}.weight", spec


class _Pool:
    """Random numbers, drawn once and handed out again and again: drawing 15 GB takes minutes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.empty(_POOL_ELEMENTS).normal_(0, _DEVIATION, generator=generator)
        self._numbers = numbers.to(DTYPE)
        self._position = 0

    def fill(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """Return a tensor's values."""
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if name.endswith(".bias"):
            return tensor.zero_()
        if "norm" in name.rpartition(".")[0]:
            return tensor.fill_(1.0)
        self._copy_into(tensor.view(-1))
        return tensor

    def _copy_into(self, flat: torch.Tensor) -> None:
        done = 0
        while done < flat.numel():
            piece = self._numbers[self._position :][: flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
            self._position = (self._position + piece.numel()) % _POOL_ELEMENTS
