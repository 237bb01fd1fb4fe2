"""Parts written as folders: what is in them, that they need nothing else, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import CheckpointError, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_core.headers import read_header
from splitlearn_core.split_checkpoint import split_checkpoint

IDS = torch.arange(14).reshape(2, 7)


def run(folders: list[Path], **options: Any) -> torch.Tensor:
    """Return the logits of the parts in `folders`, one after the other."""
    value: Any = IDS
    for folder in folders:
        value = SplitModel.load(folder, **options)(value)
    logits: torch.Tensor = value.logits
    return logits


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def original(make_checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a copy of a tied checkpoint of several files, with a tokenizer and code beside it."""
    folder = tmp_path / "original"
    shutil.copytree(make_checkpoint("qwen2-tied", shard_size="20KB").path, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "gpt2"])
@pytest.mark.parametrize("points", [[2, 4], [1, 3, 5]], ids=str)
def test_the_parts_are_the_model_and_need_no_original(
    kind: str, points: list[int], make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(kind)
    original = tmp_path / "original"
    shutil.copytree(checkpoint.path, original)

    written = split_checkpoint(original, points, tmp_path / "out")
    shutil.rmtree(original)

    expected = checkpoint.unsplit()(IDS).logits
    assert torch.equal(run([part.folder for part in written]), expected)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        part.manifest.spec.name for part in written
    )


def test_a_part_is_found_by_load_component_too(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    split_checkpoint(path, [2, 4], tmp_path)
    hidden = torch.randn(2, 7, 32)

    trunk = load_component(tmp_path / "trunk", "trunk", [2, 4])

    assert torch.equal(trunk(hidden), load_component(path, "trunk", [2, 4])(hidden))
    with pytest.raises(CheckpointError, match=r"trunk lacks tensors.*layers\.4\."):
        load_component(tmp_path / "trunk", "trunk", [2, 5])
    with pytest.raises(CheckpointError, match=r"trunk lacks tensors.*lm_head"):
        load_component(tmp_path / "trunk", "top", [2, 4])


def test_each_part_has_its_own_bytes_alone(original: Path, tmp_path: Path) -> None:
    written = split_checkpoint(original, [2, 4], tmp_path / "out")

    names = [set(read_header(part.folder / "model.safetensors")) for part in written]

    assert all(".layers.0." in n or ".layers.1." in n or "embed" in n for n in names[0])
    assert all(".layers.2." in n or ".layers.3." in n for n in names[1])
    assert names[0] & names[2] == {"model.embed_tokens.weight"}, "the tied head"
    for part in written:
        loaded = SplitModel.load(part.folder)
        assert part.manifest.num_parameters == loaded.num_parameters()
        assert part.nbytes >= sum(p.nbytes for p in loaded.parameters())


def test_tokenizers_go_where_text_is_and_code_goes_nowhere(original: Path, tmp_path: Path) -> None:
    split_checkpoint(original, [2, 4], tmp_path / "out")

    weights = {"config.json", "model.safetensors", "splitlearn.json"}
    text = {"tokenizer.json", "generation_config.json"}
    assert files_below(tmp_path / "out") == {
        *(f"bottom/{name}" for name in weights | text),
        *(f"trunk/{name}" for name in weights),
        *(f"top/{name}" for name in weights | text),
    }


def test_a_cast_split_equals_a_cast_model(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama")
    written = split_checkpoint(checkpoint.path, [2, 4], tmp_path, dtype="bfloat16")

    assert {part.manifest.dtype for part in written} == {"bfloat16"}
    expected = checkpoint.unsplit(dtype=torch.bfloat16)(IDS).logits
    assert torch.equal(run([part.folder for part in written]), expected)
    config = json.loads((tmp_path / "trunk" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_hub_names_stay(hub_named_gpt2: Any, tmp_path: Path) -> None:
    written = split_checkpoint(hub_named_gpt2.path, [2, 4], tmp_path / "out")

    names = set(read_header(tmp_path / "out" / "trunk" / "model.safetensors"))
    assert "h.2.attn.c_attn.weight" in names
    assert "h.2.attn.bias" not in names, "no module needs the mask"
    expected = hub_named_gpt2.unsplit()(IDS).logits
    assert torch.equal(run([part.folder for part in written]), expected)


def test_a_folder_that_is_not_empty_is_refused(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="not empty"):
        split_checkpoint(path, [2, 4], tmp_path)
    assert files_below(tmp_path) == {"notes.txt"}


def test_force_replaces_all_parts_and_nothing_else(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama")
    split_checkpoint(checkpoint.path, [1, 3, 5], tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    in_use = SplitModel.load(tmp_path / "top")
    hidden = torch.randn(1, 3, 32)
    expected = in_use(hidden).logits

    written = split_checkpoint(checkpoint.path, [2, 4], tmp_path, force=True)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["bottom", "notes.txt", "top", "trunk"]
    assert torch.equal(run([part.folder for part in written]), checkpoint.unsplit()(IDS).logits)
    assert torch.equal(in_use(hidden).logits, expected), "a part that is mapped stays whole"


def test_force_does_not_replace_what_is_no_part(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk" / "elephant.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="trunk is no part"):
        split_checkpoint(make_checkpoint("llama").path, [2, 4], tmp_path, force=True)
    assert files_below(tmp_path) == {"trunk/elephant.txt"}


def test_a_file_in_the_way(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    for out in (tmp_path / "out", tmp_path / "out" / "parts"):
        with pytest.raises(FileExistsError, match="out is a file"):
            split_checkpoint(make_checkpoint("llama").path, [2, 4], out)


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_fails_leaves_nothing(
    exists: bool, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    seen: list[int] = []

    def stop_in_the_trunk(done: int, total: int) -> None:
        seen.append(done)
        if done > total / 2:
            raise InterruptedError("stopped")

    with pytest.raises(InterruptedError):
        split_checkpoint(make_checkpoint("llama").path, [2, 4], out, progress=stop_in_the_trunk)

    assert len(seen) > 20
    assert files_below(tmp_path) == set()
    assert list(tmp_path.rglob("*")) == ([out] if exists else [])


def test_progress_counts_to_the_bytes_of_all_parts(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    written = split_checkpoint(
        make_checkpoint("qwen2-tied").path,
        [2, 4],
        tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )

    parts = [SplitModel.load(part.folder) for part in written]
    in_all = sum(p.nbytes for part in parts for p in part.parameters())
    assert seen[0] == (0, in_all)
    assert seen[-1] == (in_all, in_all)


def test_no_room(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(OSError, match=r"parts need [\d,]+ bytes; .* has room for 1,000"):
        split_checkpoint(make_checkpoint("llama").path, [2, 4], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_leaves_nothing(damaged: Callable[..., Any], tmp_path: Path) -> None:
    path = damaged("llama", drop=("model.norm.weight",)).path

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        split_checkpoint(path, [2, 4], tmp_path / "out")
    assert not (tmp_path / "out").exists()
