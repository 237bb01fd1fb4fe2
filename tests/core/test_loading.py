"""Loading: layouts, dtypes, memory sharing, saving, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitlearn_core import CheckpointError, ModelFactory, ModelRegistry, SplitModel
from splitlearn_core.errors import ModelSourceError, UnsupportedModelError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.loading.files import cache_folder
from splitlearn_core.part_manifest import saved_parts
from splitlearn_core.quickstart import (
    load_bottom_model,
    load_full_model,
    load_split_model,
    load_top_model,
)

IDS = torch.arange(14).reshape(2, 7)


def mapped_files(part: SplitModel) -> set[str]:
    """Return the files whose mappings hold the part's weights (Linux)."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in fields[0].split("-"))
        spans.append((start, end, fields[5] if len(fields) > 5 else ""))
    return {
        next(name for start, end, name in spans if start <= p.data_ptr() < end)
        for p in part.parameters()
    }


def test_sharded_checkpoint_reads_only_the_files_it_needs(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", shard_size="20KB")
    index = json.loads((checkpoint.path / "model.safetensors.index.json").read_text())
    needed = {f for n, f in index["weight_map"].items() if ".layers.2." in n or ".layers.3." in n}
    assert needed < set(index["weight_map"].values())
    for name in ["config.json", "model.safetensors.index.json", *needed]:
        (tmp_path / name).write_bytes((checkpoint.path / name).read_bytes())

    trunk = load_component(tmp_path, "trunk", [2, 4])

    hidden = torch.randn(2, 7, 32)
    _, whole_trunk, _ = load_split_model("llama", [2, 4], checkpoint.path)
    assert torch.equal(trunk(hidden), whole_trunk(hidden))  # type: ignore[operator, misc]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_of_a_single_file_and_an_index_the_file_is_taken(
    kind: str, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """So does transformers."""
    shutil.copytree(make_checkpoint("llama", shard_size="20KB").path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(make_checkpoint("llama").path / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    if kind == "safetensors":
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        for path in tmp_path.glob("model*"):
            path.unlink()
        index = {"weight_map": dict.fromkeys(tensors, "shard.bin")}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save(tensors, tmp_path / "shard.bin")
        torch.save(changed, tmp_path / "pytorch_model.bin")

    head = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(head, changed["lm_head.weight"])
    for low_memory in (False, True):
        _, _, top = load_split_model("llama", [2, 4], tmp_path, low_memory=low_memory)
        assert torch.equal(top.model.lm_head.weight, head)  # type: ignore[union-attr]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are listed on Linux")
def test_weights_stay_views_of_the_file_unless_asked(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path

    mapped = load_component(path, "trunk", [2, 4])
    private = load_component(path, "trunk", [2, 4], mmap=False)
    cast = load_component(path, "trunk", [2, 4], dtype="bfloat16")

    weights = str((path / "model.safetensors").resolve())
    assert mapped_files(mapped) == {weights}
    assert weights not in mapped_files(private) | mapped_files(cast)
    assert cast.dtype is torch.bfloat16


def test_only_wanted_parts_are_built(make_checkpoint: Callable[..., Any]) -> None:
    bottom, trunk, top = load_split_model(
        "llama", [2, 4], make_checkpoint("llama").path, parts=["trunk"]
    )

    assert bottom is None
    assert top is None
    assert isinstance(trunk, SplitModel)
    assert (trunk.component, trunk.start_layer, trunk.end_layer) == ("trunk", 2, 4)


def test_parts_come_back_in_evaluation_mode(make_checkpoint: Callable[..., Any]) -> None:
    parts = load_split_model("gpt2", [2, 4], make_checkpoint("gpt2").path)

    assert not any(module.training for part in parts for module in part.modules())  # type: ignore[union-attr]


def test_estimate_is_what_the_part_takes(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("qwen2-tied").path
    for component in ("bottom", "trunk", "top", "full"):
        estimate = estimate_component(path, component, [2, 4])
        part = load_component(path, component, [2, 4])
        tables = [buffer.nbytes for buffer in part.buffers()]
        assert estimate.steady_bytes == part.nbytes == sum(tables) + part.num_parameters() * 4
        assert estimate.peak_bytes == part.nbytes + 2 * max(tables), "while a table is computed"

    cast = estimate_component(path, "trunk", [2, 4], dtype="bfloat16")
    assert cast.steady_bytes == load_component(path, "trunk", [2, 4], dtype="bfloat16").nbytes
    assert cast.peak_bytes > cast.steady_bytes


def test_progress_counts_to_the_part_and_can_end_the_load(
    make_checkpoint: Callable[..., Any],
) -> None:
    path = make_checkpoint("llama").path
    seen: list[tuple[int, int]] = []

    trunk = load_component(
        path, "trunk", [2, 4], progress=lambda done, total: seen.append((done, total))
    )

    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == trunk.num_parameters() * 4
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(done: int, total: int) -> None:
        raise InterruptedError(f"{done} of {total}")

    with pytest.raises(InterruptedError):
        load_component(path, "trunk", [2, 4], progress=stop)


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "gpt2"])
def test_save_and_load(kind: str, make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(kind)
    parts = ModelFactory.create_split_models(
        checkpoint.model_type, checkpoint.path, 2, 4, storage_path=tmp_path, auto_save=True
    )

    loaded = [SplitModel.load(tmp_path / f"{name}.pt") for name in ("bottom", "trunk", "top")]

    value: Any = IDS
    for part in loaded:
        value = part(value)
    assert torch.equal(value.logits, checkpoint.unsplit()(IDS).logits)
    assert [p.component for p in loaded] == [p.component for p in parts]  # type: ignore[union-attr]


def test_saving_over_a_part_that_is_mapped(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    trunk = load_component(make_checkpoint("llama").path, "trunk", [2, 4])
    trunk.save(tmp_path)
    again = SplitModel.load(tmp_path)
    expected = again(torch.ones(1, 3, 32))

    again.save(tmp_path)

    assert torch.equal(again(torch.ones(1, 3, 32)), expected)
    assert torch.equal(SplitModel.load(tmp_path)(torch.ones(1, 3, 32)), expected)


def test_a_saved_part_that_was_cut_off(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    load_component(make_checkpoint("llama").path, "trunk", [2, 4]).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)

    with pytest.raises(CheckpointError, match="the manifest says"):
        SplitModel.load(tmp_path)


def test_no_saved_part(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"splitlearn\.json"):
        SplitModel.load(tmp_path / "trunk.pt")


def test_classes_from_the_registry(make_checkpoint: Callable[..., Any]) -> None:
    unsplit = make_checkpoint("gpt2").unsplit()
    state = unsplit.state_dict()
    bottom = ModelRegistry.get_model_class("gpt2", "bottom").from_pretrained_split(
        state, unsplit.config, end_layer=2
    )
    trunk = ModelRegistry.get_model_class("gpt2", "trunk").from_pretrained_split(
        state, unsplit.config, start_layer=2, end_layer=4
    )
    top = ModelRegistry.get_model_class("gpt2", "top").from_pretrained_split(
        state, unsplit.config, start_layer=4
    )

    assert torch.equal(top(trunk(bottom(IDS))).logits, unsplit(IDS).logits)


def test_quick_ends(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("llama")
    bottom = load_bottom_model("llama", 2, checkpoint.path)
    trunk = load_component(checkpoint.path, "trunk", [2, 4])
    top = load_top_model("llama", 4, checkpoint.path)

    assert torch.equal(top(trunk(bottom(IDS))).logits, checkpoint.unsplit()(IDS).logits)


def test_full_model_comes_without_tokenizer_where_there_is_none(
    make_checkpoint: Callable[..., Any],
) -> None:
    model, tokenizer = load_full_model(make_checkpoint("llama").path)

    assert tokenizer is None
    assert not model.training


def test_torch_files(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen2-tied")
    (tmp_path / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    torch.save(load_file(checkpoint.path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expected = checkpoint.unsplit()(IDS).logits

    for name in (tmp_path, tmp_path / "pytorch_model.bin"):
        value: Any = IDS
        for part in load_split_model("auto", [2, 4], name, low_memory=True):
            value = part(value)  # type: ignore[operator, misc]
        assert torch.equal(value.logits, expected)


class Bomb:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    "content",
    [{"weight": Bomb()}, [torch.ones(1)], {"epoch": 3, "w": torch.ones(1)}],
    ids=["code", "a list", "a number"],
)
def test_a_torch_file_of_anything_but_tensors_is_refused(
    content: Any,
    make_checkpoint: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_checkpoint("llama").path / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    torch.save(content, tmp_path / "model.pth")

    with pytest.raises(CheckpointError, match=r"model\.pth"):
        load_component(tmp_path / "model.pth", "full")
    assert not Path("exploded").exists()


def test_a_bare_pickle_is_refused(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_checkpoint("llama").path / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_component(tmp_path, "full")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_missing_tensor_is_named(damaged: Callable[..., Any], low_memory: bool) -> None:
    lost = ("model.layers.3.mlp.up_proj.weight", "model.norm.weight")
    path = damaged("llama", drop=lost).path

    with pytest.raises(CheckpointError) as caught:
        load_split_model("llama", [4, 5], path, low_memory=low_memory)

    named = [name for name in lost if name in str(caught.value)]
    assert named
    assert str(path) in str(caught.value)


def test_every_missing_tensor_of_a_part_is_named(damaged: Callable[..., Any]) -> None:
    lost = ("model.layers.3.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight")
    path = damaged("llama", drop=lost).path

    with pytest.raises(ValueError, match="lacks tensors") as caught:
        load_component(path, "trunk", [2, 4])

    assert all(name in str(caught.value) for name in lost)


def test_a_part_loads_though_another_lacks_a_tensor(damaged: Callable[..., Any]) -> None:
    path = damaged("llama", drop=("lm_head.weight",)).path

    assert load_component(path, "trunk", [2, 4]).num_parameters() > 0
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_component(path, "top", [2, 4])


def test_a_wrong_shape_is_named_with_both(damaged: Callable[..., Any]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    path = damaged("llama", replace={name: torch.zeros(48, 31)}).path

    with pytest.raises(CheckpointError, match=r"up_proj.*\[48, 31\].*\[48, 32\]"):
        load_component(path, "trunk", [2, 4])


def test_a_tensor_that_nothing_explains_is_named(damaged: Callable[..., Any]) -> None:
    path = damaged("llama", replace={"model.layers.3.secret": torch.zeros(3)}).path

    with pytest.raises(CheckpointError, match=r"no part.*model\.layers\.3\.secret"):
        load_component(path, "trunk", [2, 4])


def test_tied_head_that_is_stored_apart_stays_apart(damaged: Callable[..., Any]) -> None:
    """As in transformers: differing values win over the config's word."""
    checkpoint = damaged("qwen2-tied", replace={"lm_head.weight": torch.randn(97, 32)})
    expected = checkpoint.unsplit()(IDS).logits

    value: Any = IDS
    for part in load_split_model("auto", [2, 4], checkpoint.path, low_memory=True):
        value = part(value)  # type: ignore[operator, misc]

    assert torch.equal(value.logits, expected)
    assert torch.equal(load_component(checkpoint.path, "full")(IDS).logits, expected)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_cut_off_file(keep: int, damaged: Callable[..., Any]) -> None:
    checkpoint = damaged("llama")
    weights = checkpoint.path / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, keep if keep >= 0 else size + keep)

    for low_memory in (False, True):
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut off"):
            load_split_model("llama", [2, 4], checkpoint.path, low_memory=low_memory)


def test_code_beside_the_config_is_refused(damaged: Callable[..., Any]) -> None:
    path = damaged("llama", config={"auto_map": {"AutoConfig": "evil.Config"}}).path

    with pytest.raises(CheckpointError, match="auto_map"):
        load_component(path, "trunk", [2, 4])


def test_unknown_architectures_list_the_known(damaged: Callable[..., Any]) -> None:
    path = damaged("llama", config={"model_type": "nonesuch"}).path

    with pytest.raises(UnsupportedModelError, match=r"known are .*gpt2.*llama.*qwen2"):
        load_component(path, "full")
    with pytest.raises(KeyError, match="nonesuch"):
        load_split_model("nonesuch", [2, 4], path)


def test_another_architecture_than_asked_for(make_checkpoint: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="is a llama model, not qwen2"):
        load_split_model("qwen2", [2, 4], make_checkpoint("llama").path)


@pytest.mark.parametrize("name", ["", "a\0b", "owner/\ud800", "./\udcff"], ids=ascii)
def test_what_can_be_the_name_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="is no model's name or path: it is empty, or holds a N"):
        load_component(name, "full")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "no.pth"])
def test_no_model_there(name: str) -> None:
    with pytest.raises(ModelSourceError, match=name):
        load_component(name, "full")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_component(tmp_path, "full")


def test_a_folder_without_weights(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    config = make_checkpoint("llama").path / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())

    with pytest.raises(FileNotFoundError, match="no weights"):
        load_component(tmp_path, "full")


@pytest.mark.parametrize("dtype", ["int8", "float33", torch.int64])
def test_unknown_dtypes(dtype: Any, make_checkpoint: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        load_component(make_checkpoint("llama").path, "full", dtype=dtype)


@pytest.mark.parametrize(
    "device", ["cuda:99", "toaster", "xpu:99", "hpu", "meta", None, True, 1.5, 99, ""], ids=repr
)
def test_unknown_devices(device: Any, make_checkpoint: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"device.* this machine has cpu"):
        load_component(make_checkpoint("llama").path, "full", device=device)


def test_the_whole_model_goes_to_a_device_that_is_there(
    make_checkpoint: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match="this machine has cpu"):
        load_full_model(make_checkpoint("llama").path, device="xpu:99")


def test_an_end_takes_whole_numbers_alone(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path

    assert load_bottom_model("auto", np.int64(2), path).end_layer == 2
    for cut in (2.0, True, "2"):
        with pytest.raises(ValueError, match="must be layer numbers"):
            load_top_model("auto", cut, path)  # type: ignore[arg-type]


def test_the_home_stands_for_itself_wherever_a_path_is_given(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_checkpoint("llama").path, tmp_path / "model")

    part = load_component("~/model", "trunk", [2, 4])
    part.save("~/saved/trunk")
    SplitModel.load("~/saved/trunk.pt")
    saved_parts("~/saved")
    create = ModelFactory.create_split_models
    create("auto", "~/model", 2, 4, parts=["top"], storage_path="~/auto", auto_save=True)

    assert (tmp_path / "auto" / "top" / "splitlearn.json").is_file()
    assert cache_folder("~/cache") == tmp_path / "cache"
    assert not (tmp_path / "~").exists()
    with pytest.raises(ModelSourceError, match="no such folder"):
        load_component("~nobody-of-that-name/model", "full")


def test_a_cache_of_another_part(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path
    bottom, trunk = load_component(path, "bottom", [2, 4]), load_component(path, "trunk", [2, 4])

    with pytest.raises(ValueError, match="belongs to"):
        trunk(torch.zeros(1, 1, 32), past_key_values=bottom.new_cache())
    with pytest.raises(ValueError, match="new_cache"):
        trunk(torch.zeros(1, 1, 32), use_cache=True)


# peft asks transformers by the older of two names
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_that_peft_merged_and_saved_loads(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="an extra of development")
    base = AutoModelForCausalLM.from_pretrained(make_checkpoint("qwen2").path)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(base, lora).merge_and_unload().eval()
    merged.save_pretrained(tmp_path)

    parts: Any = load_split_model("auto", [2, 4], tmp_path, low_memory=True)
    hidden = parts[0](IDS)
    with torch.no_grad():
        assert torch.equal(parts[2](parts[1](hidden)).logits, merged(IDS).logits)
