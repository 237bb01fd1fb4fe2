"""Fixtures: one run of two ranks, that all tests of sharded models share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Checkpoint
from dcp_checks import state_of, tiny, trained
from ranks import Run, run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from splitlearn_core.sharded import save_dcp


@dataclass(frozen=True)
class TwoRanks:
    """What two ranks have done.

    Attributes:
        folder: Where they worked.
        found: For each rank, what each check answered.
    """

    folder: Path
    found: list[dict[str, Any]]

    def __call__(self, check: str) -> list[Any]:
        """Return what both ranks answered to a check."""
        for rank, answers in enumerate(self.found):
            assert "error" not in answers[check], f"rank {rank}: {answers[check]['error']}"
        return [answers[check]["value"] for answers in self.found]


# A slice of the campaign: layers that share parameters; a padding row that is always zero.
TYPES = ["zamba2", "youtu"]
# Fused experts; a gate of one row; a buffer in each layer that a checkpoint has.
_TYPES = {"experts": "qwen3_moe", "one-row": "qwen2_moe", "buffers": "hy_v3"}


@pytest.fixture(scope="session")
def at_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that one process without a group has written, its state beside it."""
    folder = tmp_path_factory.mktemp("at-one")
    model = tiny()
    optimizer = trained(model)
    save_dcp(folder / "dcp", model, optimizer)
    torch.save(state_of(model, optimizer), folder / "state.pt")
    return folder


@pytest.fixture(scope="session")
def two_ranks(
    at_one: Path,
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> TwoRanks:
    """Return what two ranks answered to all checks: they are started once for all tests."""
    folder = tmp_path_factory.mktemp("two-ranks")
    settings = {
        "at_one": str(at_one / "dcp"),
        "at_one_state": str(at_one / "state.pt"),
        "types": TYPES,
        **_checkpoints(make_checkpoint, folder / "models"),
    }
    run = Run(str(folder), ["dcp_checks", "sharded_checks", "sharded_types"], 2, settings)
    run_ranks(folder, [run])
    return TwoRanks(folder, run.answers())


def _checkpoints(make: Callable[..., Checkpoint], folder: Path) -> dict[str, str]:
    """Make the models that ranks load."""
    folder.mkdir()
    llama = make("llama", shard_size="40KB").path
    tied = make("llama-tied").path
    for name, kind in _TYPES.items():
        tiny_model(kind).save_pretrained(folder / name)
    _with(tied, folder / "tied-twice", lambda t: {"lm_head.weight": t["model.embed_tokens.weight"]})
    _with(tied, folder / "untied-values", _another_head)
    _with(make("llama").path, folder / "torch-file", None)
    torch.save(
        load_file(folder / "torch-file/model.safetensors"), folder / "torch-file/pytorch_model.bin"
    )
    (folder / "torch-file/model.safetensors").unlink()
    for name in ("other-weights", "truncated", "missing"):
        shutil.copytree(llama, folder / name)
    _damage(folder)
    names = (*_TYPES, "tied-twice", "untied-values", "torch-file")
    names += ("other-weights", "truncated", "missing")
    paths = {name: folder / name for name in names}
    paths |= {"llama": llama, "tied": tied, "gpt2": make("gpt2").path}
    return {name: str(path) for name, path in paths.items()}


def _another_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


def _with(
    original: Path,
    folder: Path,
    more: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None,
) -> None:
    """Copy a checkpoint, with tensors added."""
    shutil.copytree(original, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    added = {} if more is None else {n: t.clone() for n, t in more(tensors).items()}
    save_file(tensors | added, file, metadata={"format": "pt"})


def _damage(folder: Path) -> None:
    """Change one value, cut a file off, take one away."""
    index = json.loads((folder / "missing/model.safetensors.index.json").read_text())
    file = index["weight_map"]["model.layers.3.mlp.down_proj.weight"]
    changed = folder / "other-weights" / file
    changed.write_bytes(changed.read_bytes()[:-4] + b"\0\0\0\0")
    cut = folder / "truncated" / file
    cut.write_bytes(cut.read_bytes()[:-100])
    (folder / "missing" / file).unlink()
