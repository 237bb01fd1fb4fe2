"""Parts generate as their model's makers say: where to end, what pads, how to sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from splitlearn_core import CheckpointError, SplitCausalLM, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_core.quickstart import load_split_model
from splitlearn_core.split_checkpoint import split_checkpoint

SETTINGS = {"eos_token_id": [7, 8], "pad_token_id": 3, "temperature": 0.5, "do_sample": True}
NAMES = ("bottom", "trunk", "top")


def chain(*parts: Any) -> SplitCausalLM:
    return SplitCausalLM(*parts)


def loaded(folder: Path, **options: Any) -> SplitCausalLM:
    return chain(*load_split_model("auto", [2, 4], folder, **options))


def saved(folder: Path, out: Path) -> SplitCausalLM:
    for part, name in zip(load_split_model("auto", [2, 4], folder), NAMES, strict=True):
        part.save(out / name)  # type: ignore[union-attr]
    return chain(*(SplitModel.load(out / name) for name in NAMES))


def split(folder: Path, out: Path) -> SplitCausalLM:
    split_checkpoint(folder, [2, 4], out)
    return chain(*(SplitModel.load(out / name) for name in NAMES))


WAYS: dict[str, Callable[[Path, Path], SplitCausalLM]] = {
    "traditional": lambda folder, _: loaded(folder),
    "incremental": lambda folder, _: loaded(folder, low_memory=True),
    "one by one": lambda folder, _: chain(*(load_component(folder, n, [2, 4]) for n in NAMES)),
    "saved": saved,
    "split": split,
}


@pytest.fixture
def folder(damaged: Callable[..., Any]) -> Path:
    path: Path = damaged("llama", config={"max_length": 11, "eos_token_id": [5, 6]}).path
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["a file", "the model's config"])
def test_settings_are_the_unsplit_model_s(
    kind: str, way: str, folder: Path, tmp_path: Path
) -> None:
    if kind == "a file":
        (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    expected = AutoModelForCausalLM.from_pretrained(folder).generation_config

    found = WAYS[way](folder, tmp_path / "out").generation_config

    differences = {
        key: (getattr(found, key, None), value)
        for key, value in expected.to_dict().items()
        if getattr(found, key, None) != value and not key.startswith(("_", "transformers"))
    }
    assert not differences
    assert found.eos_token_id == ([7, 8] if kind == "a file" else [5, 6])


def test_each_of_several_ends_ends_a_text(folder: Path) -> None:
    unsplit: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(5, 14).reshape(1, 9)
    first, *others = unsplit.generate(
        ids, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    )[0, 9:].tolist()
    ends = {"eos_token_id": [96, first], "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    unsplit = AutoModelForCausalLM.from_pretrained(folder).eval()

    text = loaded(folder).generate(ids, max_new_tokens=8)

    assert text.tolist() == unsplit.generate(ids, max_new_tokens=8).tolist()
    assert text[0, 9:].tolist() == [first]
    assert len(others) == 7


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_settings_are_refused_by_the_part_that_needs_them(
    content: str, folder: Path
) -> None:
    (folder / "generation_config.json").write_text(content)

    assert load_component(folder, "bottom", [2, 4]).component == "bottom"
    assert load_component(folder, "trunk", [2, 4]).component == "trunk"
    for name in ("top", "full"):
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            load_component(folder, name, [2, 4])
