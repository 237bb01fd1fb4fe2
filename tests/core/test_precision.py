"""The dtypes that weights get: those of transformers' `dtype="auto"`, in both strategies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from certifier import compare_tensors, tensors_of
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from splitlearn_core import ModelRegistry, SplitCausalLM, SplitModel
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.headers import read_header
from splitlearn_core.quickstart import load_split_model
from splitlearn_core.split_checkpoint import split_checkpoint

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def mixed(make_checkpoint: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a Llama whose tensors have several dtypes."""

    def write(other: str, named: str | None, dtype: torch.dtype = F32) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(make_checkpoint("llama", dtype="bfloat16").path, folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        cast = {n: t.to(dtype) if other in n else t for n, t in tensors.items()}
        save_file(cast, path, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(
            json.dumps(config | ({"dtype": named} if named else {}))
        )
        return folder

    return write


def check(folder: Path, dtype: torch.dtype | None = None) -> set[torch.dtype]:
    """Compare both strategies with transformers; return the dtypes that there are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    expected = {name: p.detach() for name, p in model.named_parameters()}
    for low_memory in (True, False):
        parts = load_split_model("auto", [2, 4], folder, low_memory=low_memory, dtype=dtype)
        for part in parts:
            assert isinstance(part, SplitModel)
            for name, value in part.model.named_parameters():
                assert value.dtype is expected[name].dtype, (low_memory, name)
                assert torch.equal(value, expected[name]), (low_memory, name)
    return {value.dtype for value in expected.values()}


@pytest.mark.parametrize("other", ["norm", "lm_head", "layers.3", "embed", "q_proj"])
@pytest.mark.parametrize("named", ["bfloat16", "float32", "float16"])
def test_weights_of_several_dtypes_get_the_one_that_the_config_names(
    other: str, named: str, mixed: Callable[..., Path]
) -> None:
    assert check(mixed(other, named)) == {getattr(torch, named)}


@pytest.mark.parametrize("other", ["lm_head", "layers.3"])
def test_where_the_config_names_none_the_first_tensor_decides(
    other: str, mixed: Callable[..., Path]
) -> None:
    assert check(mixed(other, None)) == {F32 if other == "lm_head" else BF16}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_dtype_that_is_asked_for_holds(dtype: torch.dtype, mixed: Callable[..., Path]) -> None:
    assert check(mixed("norm", "bfloat16"), dtype) == {dtype}


def test_weights_of_one_dtype_keep_it_whatever_the_config_names(
    mixed: Callable[..., Path],
) -> None:
    folder = mixed("", "bfloat16")  # all of them

    for low_memory in (True, False):
        for part in load_split_model("llama", [2, 4], folder, low_memory=low_memory):
            assert {p.dtype for p in part.parameters()} == {F32}  # type: ignore[union-attr]


def test_of_a_part_with_the_named_dtype_only_its_own_files_are_looked_at(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_checkpoint("llama", dtype="bfloat16", shard_size="20KB").path
    index = json.loads((source / "model.safetensors.index.json").read_text())
    needed = {f for n, f in index["weight_map"].items() if ".layers.2." in n or ".layers.3." in n}
    for name in ("config.json", "model.safetensors.index.json", *needed):
        shutil.copyfile(source / name, tmp_path / name)

    assert load_component(tmp_path, "trunk", [2, 4]).dtype is BF16


@pytest.mark.parametrize("dtype", [None, BF16, torch.float16, F32])
@pytest.mark.parametrize("stored", [BF16, F32])
def test_what_an_architecture_keeps_in_float32_stays_so(
    stored: torch.dtype, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = tiny_model("glm4_moe")
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    model.to(stored).save_pretrained(tmp_path)

    found = {p.dtype for p in load_component(tmp_path, "trunk", [2, 4], dtype=dtype).parameters()}
    check(tmp_path, dtype)

    for low_memory in (True, False):
        _, trunk, _ = load_split_model("auto", [2, 4], tmp_path, dtype=dtype, low_memory=low_memory)
        assert trunk.model.state_dict()[name].dtype is F32  # type: ignore[union-attr]
    assert dtype or stored in found


# What is float32 in them though nothing asks for that, or half though a float32 skeleton has it:
# tables (xglm, openai-gpt, falcon_h1), routers (hunyuan, lfm2, zaya), recurrences (zamba, olmo).
PARTICULAR = ["xglm", "openai-gpt", "falcon_h1", "hunyuan_v1_moe", "lfm2_moe", "zaya", "zamba"]
PARTICULAR += ["olmo_hybrid", "gemma3n_text", "falcon_mamba"]
POINTS = [2, 4]


def save_tiny(model_type: str, folder: Path, stored: torch.dtype, *, named: bool = True) -> Path:
    """Save a small model with all its weights in one dtype, which the config names or does not."""
    tiny_model(model_type).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    cast = {n: t.to(stored) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(cast, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    config |= {"dtype": str(stored).removeprefix("torch.")} if named else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compare_parts(unsplit: Any, parts: Any) -> None:
    """Compare tensors, and one forward, to the bit."""
    compare_tensors(tensors_of(unsplit), parts)
    bottom, *trunks, top = parts
    ids = torch.arange(3, 21).reshape(2, 9)
    with torch.no_grad():
        assert torch.equal(SplitCausalLM(bottom, trunks, top)(ids).logits, unsplit(ids).logits)


@pytest.mark.parametrize("model_type", PARTICULAR)
@pytest.mark.parametrize("asked", [BF16, torch.float16])
def test_half_precision_that_is_asked_for(
    model_type: str, asked: torch.dtype, tmp_path: Path
) -> None:
    save_tiny(model_type, tmp_path, F32)
    unsplit = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)

    for low_memory in (True, False):
        parts: Any = load_split_model("auto", POINTS, tmp_path, dtype=asked, low_memory=low_memory)
        compare_parts(unsplit, parts)
        assert {part.config.dtype for part in parts} == {str(asked).removeprefix("torch.")}


@pytest.mark.parametrize("model_type", PARTICULAR)
@pytest.mark.parametrize("named", [True, False])
def test_half_precision_that_is_stored(model_type: str, *, named: bool, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, BF16, named=named)
    unsplit = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")

    for low_memory in (True, False):
        compare_parts(unsplit, load_split_model("auto", POINTS, tmp_path, low_memory=low_memory))


@pytest.mark.parametrize("model_type", PARTICULAR)
def test_half_precision_that_transformers_saved(model_type: str, tmp_path: Path) -> None:
    """Its own files hold what is float32 in its models as that."""
    save_tiny(model_type, tmp_path / "first", F32)
    unsplit = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=BF16)
    unsplit.save_pretrained(tmp_path / "model")

    for low_memory in (True, False):
        parts = load_split_model("auto", POINTS, tmp_path / "model", low_memory=low_memory)
        compare_parts(unsplit, parts)


@pytest.mark.parametrize("model_type", PARTICULAR)
def test_half_precision_that_was_saved_part_by_part(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path / "model", F32)
    unsplit = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=BF16)
    parts: Any = load_split_model("auto", POINTS, tmp_path / "model", dtype=BF16)
    for part in parts:
        part.save(tmp_path / "saved" / part.component)
    split_checkpoint(tmp_path / "model", POINTS, tmp_path / "split", dtype=BF16)

    for folder in ("saved", "split"):
        names = ("bottom", "trunk", "top")
        compare_parts(unsplit, [SplitModel.load(tmp_path / folder / name) for name in names])


@pytest.mark.parametrize("model_type", ["xglm", "hunyuan_v1_moe"])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_half_precision_from_a_hub(
    model_type: str, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(model_type, tmp_path / "model", F32 if dtype else BF16)
    unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setenv("SPLITLEARN_CACHE_DIR", str(tmp_path / "ours"))

    with LoopbackHub({"someone/model": folder}).run() as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        parts = load_split_model("auto", POINTS, "someone/model", dtype=dtype, low_memory=True)

    compare_parts(unsplit, parts)


@pytest.mark.parametrize("model_type", PARTICULAR)
def test_half_precision_of_a_model_in_memory(model_type: str, tmp_path: Path) -> None:
    save_tiny(model_type, tmp_path, F32)
    unsplit = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    spans = {"bottom": (0, 2), "trunk": (2, 4), "top": (4, 6)}

    parts = [
        ModelRegistry.get_model_class(model_type, name).from_pretrained_split(
            unsplit.state_dict(), unsplit.config, start_layer=start, end_layer=end
        )
        for name, (start, end) in spans.items()
    ]

    compare_parts(unsplit, parts)
    theirs = {t.data_ptr() for t in unsplit.parameters()}
    assert all(p.data_ptr() in theirs for part in parts for p in part.parameters()), "no copies"


def test_figures_and_split_parts_have_the_same_dtypes(
    mixed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = mixed("norm", "bfloat16")
    part = load_component(folder, "trunk", [2, 4])

    assert estimate_component(folder, "trunk", [2, 4]).steady_bytes == part.nbytes
    split_checkpoint(folder, [2, 4], tmp_path / "parts")
    infos = read_header(tmp_path / "parts" / "trunk" / "model.safetensors")
    assert {info.dtype for info in infos.values()} == {"BF16"}
    again = SplitModel.load(tmp_path / "parts" / "trunk").model.state_dict()
    assert all(torch.equal(again[n], v) for n, v in part.model.state_dict().items())
