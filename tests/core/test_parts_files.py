"""A folder of saved parts in the place of a model's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import SplitModel
from splitlearn_core.errors import CheckpointError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.loading.files import find_files
from splitlearn_core.loading.parts_files import PartsFiles
from splitlearn_core.quickstart import load_tokenizer
from splitlearn_core.split_checkpoint import split_checkpoint

POINTS = [2, 4]
IDS = torch.arange(5, 17)[None]


@pytest.fixture(params=["llama", "llama-tied", "gpt2"])
def parts(request: Any, make_checkpoint: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Return a checkpoint, and the folder that its parts were written to."""
    whole = Path(make_checkpoint(request.param).path)
    split_checkpoint(whole, POINTS, tmp_path / "parts")
    return whole, tmp_path / "parts"


def weights(part: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = part.model.state_dict()
    return found


@pytest.mark.parametrize("component", ["bottom", "trunk", "top", "full"])
def test_each_part_is_what_it_is_of_the_model_itself(
    parts: tuple[Path, Path], component: str
) -> None:
    whole, folder = parts
    expected = weights(load_component(whole, component, POINTS))

    found = weights(load_component(folder, component, POINTS))

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    estimates = [estimate_component(place, component, POINTS) for place in parts]
    assert estimates[0] == estimates[1]


def test_other_cuts_can_be_made_of_the_parts(parts: tuple[Path, Path]) -> None:
    whole, folder = parts
    expected, found = (load_component(place, "trunk", [1, 3]) for place in (whole, folder))
    hidden = torch.randn(1, 4, expected.hidden_size).to(expected.dtype)

    assert torch.equal(found(hidden), expected(hidden))


def test_without_the_trunk_both_ends_can_be_loaded(parts: tuple[Path, Path]) -> None:
    _, folder = parts
    shutil.rmtree(folder / "trunk")

    bottom, top = (load_component(folder, name, POINTS) for name in ("bottom", "top"))

    assert (bottom.end_layer, top.start_layer) == (2, 4)
    said = rf"{folder} \(bottom \[0, 2\), top \[4, \d\)\) lacks tensors that are needed"
    for asked in ("trunk", "full"):
        with pytest.raises(CheckpointError, match=said):
            load_component(folder, asked, POINTS)


def test_parts_of_different_models_are_refused(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    for kind in ("llama", "llama-tied"):
        split_checkpoint(Path(make_checkpoint(kind).path), POINTS, tmp_path / kind)
    shutil.rmtree(tmp_path / "llama" / "top")
    shutil.move(tmp_path / "llama-tied" / "top", tmp_path / "llama" / "top")

    with pytest.raises(CheckpointError, match=r"top/config.json is of another model than the"):
        find_files(tmp_path / "llama")


def test_parts_that_have_the_same_layers_are_refused(parts: tuple[Path, Path]) -> None:
    whole, folder = parts
    load_component(whole, "full").save(folder / "full")

    with pytest.raises(CheckpointError, match=r"full \[0, \d\) have the same layers"):
        load_component(folder, "trunk", POINTS)


def test_a_part_that_was_changed_and_saved_again_is_the_one_that_counts(
    parts: tuple[Path, Path],
) -> None:
    _, folder = parts
    trunk = SplitModel.load(folder / "trunk")
    with torch.no_grad():
        next(iter(trunk.model.parameters())).add_(1)
    trunk.save(folder / "trunk")

    found = weights(load_component(folder, "trunk", POINTS))

    assert all(torch.equal(found[name], tensor) for name, tensor in weights(trunk).items())
    assert load_component(folder, "bottom", POINTS).end_layer == 2


def test_parts_in_different_dtypes_are_refused(parts: tuple[Path, Path]) -> None:
    _, folder = parts
    SplitModel.load(folder / "top", dtype="bfloat16").save(folder / "top")

    with pytest.raises(CheckpointError, match=r"of another model.*dtype is 'bfloat16', not 'float"):
        load_component(folder, "trunk", POINTS)


def test_a_part_that_is_a_link_to_elsewhere_is_refused(parts: tuple[Path, Path]) -> None:
    _, folder = parts
    shutil.move(folder / "trunk", folder.parent / "elsewhere")
    (folder / "trunk").symlink_to(folder.parent / "elsewhere")

    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        load_component(folder, "bottom", POINTS)


def test_what_lies_beside_the_parts_counts(parts: tuple[Path, Path]) -> None:
    _, folder = parts
    load_tokenizer("builtin:demo").save_pretrained(folder)
    shutil.copy(folder / "top" / "model.safetensors", folder)

    assert load_tokenizer(folder)("def")["input_ids"]
    assert find_files(folder).find("model.safetensors") is None
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        load_component(folder, "bottom", POINTS)


def test_a_part_that_is_damaged_is_refused(parts: tuple[Path, Path]) -> None:
    _, folder = parts
    with (folder / "top" / "model.safetensors").open("ab") as file:
        file.write(b"more")

    with pytest.raises(CheckpointError, match=r"top/model.safetensors has \d+ bytes"):
        load_component(folder, "bottom", POINTS)


def test_a_model_with_parts_within_is_that_model(
    parts: tuple[Path, Path], make_checkpoint: Callable[..., Any]
) -> None:
    _, folder = parts
    whole = Path(make_checkpoint("llama").path)
    for file in whole.iterdir():
        shutil.copy(file, folder / file.name)

    assert not isinstance(find_files(folder), PartsFiles)


def test_the_tokenizer_is_that_of_the_ends(tmp_path: Path) -> None:
    split_checkpoint("builtin:demo", POINTS, tmp_path)
    shutil.rmtree(tmp_path / "trunk")

    tokenizer = load_tokenizer(tmp_path)

    assert tokenizer("def")["input_ids"] == load_tokenizer("builtin:demo")("def")["input_ids"]
    assert json.loads((tmp_path / "top" / "generation_config.json").read_text())


def test_files_are_found_without_torch(parts: tuple[Path, Path]) -> None:
    script = (
        "import sys; from splitlearn_core.loading.files import find_files;"
        f"print(find_files({str(parts[1])!r}).description, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip().endswith("False")
    assert "bottom [0, 2)" in done.stdout
