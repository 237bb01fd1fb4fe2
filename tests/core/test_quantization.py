"""Parts with packed weights: of each kind of architecture, what they compute, hold and refuse."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core import ModelFactory, SplitCausalLM, SplitModel
from splitlearn_core.errors import PackedWeightsError, QuantizationError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.loading import materialize as materializing
from splitlearn_core.loading.packing import Packer
from splitlearn_core.packed_linear import PackedLinear
from splitlearn_core.quantization import QUANTIZATIONS
from splitlearn_core.quickstart import load_split_model, load_top_model

POINTS = [2, 4]
IDS = torch.arange(3, 27).reshape(2, 12)
TOLERANCES = {"prepacked": 1e-5, "fp16": 2e-3, "int8": 5e-2}
# Random routers are undecided: a token goes to another expert by a small change.
ROUTED = {"prepacked": 1e-5, "fp16": 5e-2, "int8": 5e-1}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Any]
) -> Callable[[str], Path]:
    """Return a function that makes a checkpoint of a kind, once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind in {"llama", "llama-tied", "gpt2"}:
            return Path(make_checkpoint(kind).path)
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            tiny_model(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


def chain(folder: Path, **options: Any) -> SplitCausalLM:
    names = ("bottom", "trunk", "top")
    return SplitCausalLM(*(load_component(folder, n, POINTS, **options) for n in names))


@torch.no_grad()
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_parts_compute_what_plain_ones_do(
    folders: Callable[[str], Path], kind: str, quantization: str
) -> None:
    plain = chain(folders(kind))(IDS).logits

    packed = chain(folders(kind), quantization=quantization)
    whole = load_component(folders(kind), "full", quantization=quantization)

    error = (packed(IDS).logits - plain).norm() / plain.norm()
    assert (error > 0) or quantization == "prepacked"
    assert error <= (ROUTED if kind == "qwen3_moe" else TOLERANCES)[quantization]
    assert torch.equal(packed(IDS).logits, whole(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_steps_with_a_cache_go_on_from_a_prefill(
    folders: Callable[[str], Path], quantization: str
) -> None:
    trunk = load_component(folders("llama"), "trunk", POINTS, quantization=quantization)
    plain = load_component(folders("llama"), "trunk", POINTS)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    cache, steps = trunk.new_cache(), hidden.split([5, 1, 1, 2], dim=1)

    found = torch.cat([trunk(step, past_key_values=cache) for step in steps], dim=1)

    assert (found - plain(hidden)).norm() <= TOLERANCES[quantization] * plain(hidden).norm()


@torch.no_grad()
def test_bfloat16_is_prepacked(folders: Callable[[str], Path]) -> None:
    plain = chain(folders("llama"), dtype="bfloat16")(IDS).logits

    packed = chain(folders("llama"), dtype="bfloat16", quantization="prepacked")

    assert packed.dtype == torch.bfloat16
    assert (packed(IDS).logits - plain).float().norm() <= 2e-2 * plain.float().norm()


# --- what is packed ---


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", "int8: 15 Linear packed"),
        ("llama-tied", "int8: 15 Linear packed"),
        ("gpt2", "int8: 8 Conv1D, 1 Linear packed"),
        (
            "qwen3_moe",
            "int8: 9 Linear packed; as they were: 2 Qwen3MoeExperts, 2 Qwen3MoeTopKRouter",
        ),
    ],
)
def test_what_is_packed_and_what_is_left_is_told(
    folders: Callable[[str], Path], kind: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        top = load_component(folders(kind), "top", POINTS, quantization="int8")

    assert str(top.packing) == text
    assert f"top of {folders(kind)}, {text}" in caplog.messages


def test_the_embedding_is_left(folders: Callable[[str], Path]) -> None:
    bottom = load_component(folders("llama"), "bottom", POINTS, quantization="int8")

    assert type(bottom.model.get_input_embeddings()) is nn.Embedding
    assert not any(type(module) is nn.Linear for module in bottom.modules())


def test_a_layer_whose_weight_is_used_by_itself_is_left(folders: Callable[[str], Path]) -> None:
    trunk = load_component(folders("mamba"), "trunk", POINTS, quantization="int8")
    plain = load_component(folders("mamba"), "trunk", POINTS)
    hidden = torch.randn(1, 5, plain.hidden_size)

    assert trunk.packing is not None
    assert trunk.packing.left["Linear (its weight is used by itself)"] >= 2
    with torch.no_grad():
        error = (trunk(hidden) - plain(hidden)).norm() / plain(hidden).norm()
    assert error <= TOLERANCES["int8"]


def test_nothing_is_packed_unless_asked_for(folders: Callable[[str], Path]) -> None:
    trunk = load_component(folders("llama"), "trunk", POINTS)

    assert (trunk.quantization, trunk.packing) == (None, None)
    assert not any(isinstance(module, PackedLinear) for module in trunk.modules())


# --- memory ---


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bfloat16 Llama of 3 layers, wide enough for the kernels' blocks not to matter."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("quantization", "share"), [("prepacked", 1.0), ("fp16", 0.5), ("int8", 0.25)]
)
def test_the_part_is_smaller_and_so_is_what_a_load_reserves(
    wide: Path, quantization: str, share: float
) -> None:
    options = {"dtype": "float32", "quantization": quantization}
    plain = load_component(wide, "trunk", [1, 2], dtype="float32")

    estimate = estimate_component(wide, "trunk", [1, 2], **options)
    part = load_component(wide, "trunk", [1, 2], **options)

    assert part.nbytes / plain.nbytes == pytest.approx(share, rel=0.05)
    assert part.nbytes == part.resident_bytes()
    assert part.num_parameters() == plain.num_parameters()
    assert estimate.steady_bytes <= part.nbytes <= estimate.steady_bytes + 2048  # rotary tables
    largest = 1024 * 2048 * (2 + 4)
    assert 2 * largest <= estimate.peak_bytes - estimate.steady_bytes <= 2.5 * largest


def test_only_two_plain_weights_are_there_at_a_time(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0
    place, arrived = materializing._place, Packer.arrived

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = place(*args, **kwargs)
        if value.dim() == 2 and value.shape != (64, 1024):
            placed.append(weakref.ref(value.untyped_storage()))
        return value

    def counted(self: Packer, part: nn.Module, target: str) -> None:
        nonlocal most
        arrived(self, part, target)
        gc.collect()
        most = max(most, sum(ref() is not None for ref in placed))

    monkeypatch.setattr(materializing, "_place", noted)
    monkeypatch.setattr(Packer, "arrived", counted)
    load_component(wide, "full", dtype="float32", quantization="int8")

    assert len(placed) == 21
    assert most <= 2


def test_the_file_is_let_go(folders: Callable[[str], Path]) -> None:
    part = load_component(folders("llama"), "bottom", POINTS, quantization="prepacked")

    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("Linux tells what is mapped")
    assert part.nbytes
    assert str(folders("llama")) not in maps.read_text(encoding="utf-8")


# --- what can't be ---


def test_weights_that_stay_bfloat16_are_refused_before_any_is_read(wide: Path) -> None:
    match = "computes in float32, not in bfloat16: set dtype to float32"
    for ask in (estimate_component, load_component):
        with pytest.raises(QuantizationError, match=match):
            ask(wide, "trunk", [1, 2], quantization="fp16")  # type: ignore[operator]


def test_what_float16_can_not_hold_is_named(damaged: Callable[..., Any]) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    folder = damaged("llama", replace={name: torch.full((32, 48), 1e6)}).path

    with pytest.raises(QuantizationError, match=rf"{name} has values from 1e\+06"):
        load_component(folder, "trunk", POINTS, quantization="fp16")
    assert load_component(folder, "trunk", POINTS, quantization="int8").quantization == "int8"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_parts_are_for_inference_alone(
    folders: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    part = load_component(folders(kind), "trunk", POINTS, quantization="int8")
    hidden = torch.randn(1, 4, part.hidden_size, requires_grad=True)

    with pytest.raises(PackedWeightsError, match="trunk can't be saved: its weights are packed"):
        part.save(tmp_path / "trunk")
    assert not list(tmp_path.iterdir())
    with pytest.raises(PackedWeightsError, match="without quantization"):
        part.state_dict()
    with pytest.raises(PackedWeightsError, match="can't become bfloat16"):
        part.to(torch.bfloat16)
    with pytest.raises(PackedWeightsError, match="no gradient passes"):
        part(hidden).sum().backward()
    assert not any(parameter.requires_grad for parameter in part.parameters())
    assert not part(hidden.detach()).requires_grad


def test_a_model_is_not_saved_on_the_way(folders: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"storage_path": tmp_path, "auto_save": True, "quantization": "int8"}

    with pytest.raises(ValueError, match="can't save packed weights"):
        ModelFactory.create_split_models("auto", folders("llama"), *POINTS, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["int4", "auto", ""])
def test_a_name_that_there_is_not(folders: Callable[[str], Path], name: str) -> None:
    with pytest.raises(ValueError, match="unknown quantization"):
        load_component(folders("llama"), "full", quantization=name)


def test_other_devices_are_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="meta"):
        load_component(folders("llama"), "full", quantization="int8", device="meta")


# --- the quick ways ---


def test_quick_ways_take_it(folders: Callable[[str], Path]) -> None:
    parts = load_split_model("auto", POINTS, folders("llama"), quantization="int8")
    top = load_top_model("auto", 4, folders("llama"), quantization="int8")

    assert [p.quantization for p in parts if isinstance(p, SplitModel)] == ["int8"] * 3
    assert top.quantization == "int8"
    assert "int8" in repr(top)


def test_the_original_is_left_as_it_was(folders: Callable[[str], Path]) -> None:
    file = folders("gpt2") / "model.safetensors"
    before = load_file(file)

    load_component(folders("gpt2"), "full", quantization="fp16")

    after = load_file(file)
    assert all(torch.equal(before[name], after[name]) for name in before)
