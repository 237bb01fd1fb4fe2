"""Saving weights for inference, and loading them, or some of them, again."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.checkpoint import load_weights, save_weights
from splitlearn_core.errors import (
    CheckpointError,
    ModelSourceError,
    PackedWeightsError,
    StorageError,
)
from splitlearn_core.quickstart import load_split_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpoints import Checkpoint

RANK_CHILD = Path(__file__).parent.parent / "support" / "rank_child.py"


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(found[name].dtype)) for name in wanted)


@pytest.fixture
def trained(make_checkpoint: Callable[..., Checkpoint]) -> PreTrainedModel:
    """Return a model in the middle of its training: in training mode, with gradients."""
    model = make_checkpoint("llama-tied").unsplit().train()
    ids = torch.arange(10).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin", "folder"])
@pytest.mark.parametrize("dtype", [None, "float16", torch.bfloat16])
def test_what_is_saved_is_loaded_again(
    trained: PreTrainedModel, tmp_path: Path, name: str, dtype: Any
) -> None:
    wanted = tensors(trained)

    saved = save_weights(trained, tmp_path / name, dtype)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    report = load_weights(trained, tmp_path / name)

    found = tensors(trained)
    in_file = {n: t.to(getattr(torch, saved.dtype)).float() for n, t in wanted.items()}
    assert_equal(found, in_file)
    assert report.is_complete
    assert not report.missing + report.unexpected + report.skipped


def test_the_model_is_left_as_it_was(trained: PreTrainedModel, tmp_path: Path) -> None:
    before, pointers = tensors(trained), {n: t.data_ptr() for n, t in trained.named_parameters()}
    gradients = {n: p.grad for n, p in trained.named_parameters()}

    save_weights(trained, tmp_path / "folder", "float16")

    assert trained.training
    assert trained.config.dtype == torch.float32
    assert {n: t.data_ptr() for n, t in trained.named_parameters()} == pointers
    assert all(p.grad is gradients[n] for n, p in trained.named_parameters())
    assert_equal(tensors(trained), before)


def test_transformers_loads_the_folder_in_its_dtype_with_its_tokenizer(
    trained: PreTrainedModel, tmp_path: Path
) -> None:
    trained.generation_config.max_new_tokens = 7  # type: ignore[union-attr]

    save_weights(trained, tmp_path, "bfloat16", tokenizer=load_tokenizer("builtin:demo"))

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype is torch.bfloat16
    assert again.generation_config.max_new_tokens == 7
    assert_equal(tensors(again), tensors(trained))
    assert AutoTokenizer.from_pretrained(tmp_path).encode("The") == load_tokenizer(
        "builtin:demo"
    ).encode("The")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_safetensors_own_loader_knows_the_tied_names(
    trained: PreTrainedModel, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    saved = save_weights(trained, tmp_path / "w.safetensors")
    fresh = make_checkpoint("llama-tied").unsplit()

    load_model(fresh, tmp_path / "w.safetensors")

    assert saved.twins == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_equal(tensors(fresh), tensors(trained))


def test_a_torch_file_is_read_by_torch_alone(trained: PreTrainedModel, tmp_path: Path) -> None:
    save_weights(trained, tmp_path / "w.pth", "float16")

    loaded = torch.load(tmp_path / "w.pth", weights_only=True)

    assert_equal(loaded, tensors(trained))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
def test_wrappers_leave_no_trace_in_the_names(trained: PreTrainedModel, tmp_path: Path) -> None:
    names = save_weights(trained, tmp_path / "plain.safetensors").tensors
    trained.model.layers[1] = torch.compile(trained.model.layers[1], backend="eager")

    compiled = torch.compile(trained, backend="eager")
    assert save_weights(compiled, tmp_path / "w.safetensors").tensors == names
    parallel = nn.DataParallel(compiled)
    assert save_weights(parallel, tmp_path / "v.safetensors").tensors == names
    assert load_weights(parallel, tmp_path / "w.safetensors").is_complete


def test_a_module_of_that_name_keeps_it(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})

    assert save_weights(model, tmp_path / "w.safetensors").tensors == (
        "module.bias",
        "module.weight",
    )
    assert load_weights(model, tmp_path / "w.safetensors").is_complete


def test_files_that_were_saved_wrapped_are_read(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    wrapped = {f"module._orig_mod.{name}": t for name, t in tensors(model).items()}
    torch.save(wrapped, tmp_path / "w.pth")

    assert load_weights(model, tmp_path / "w.pth").loaded == ("bias", "weight")


def test_parts_are_saved_as_parts_and_a_chain_as_a_whole(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama-tied")
    bottom, trunk, top = load_split_model("llama", [2, 4], checkpoint.path, low_memory=True)

    for part in (bottom, trunk, top):
        save_weights(part, tmp_path / part.component, "float16")  # type: ignore[arg-type, union-attr]
    save_weights(SplitCausalLM(bottom, trunk, top), tmp_path / "whole")

    again = SplitModel.load(tmp_path / "trunk", verify_hashes=True)
    assert again.dtype is torch.float16
    assert_equal(tensors(again), tensors(trunk))  # type: ignore[arg-type]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert_equal(tensors(whole), tensors(checkpoint.unsplit()))


def test_a_part_takes_its_own_of_a_whole_models_file(
    make_checkpoint: Callable[..., Checkpoint], trained: PreTrainedModel, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    save_weights(trained, tmp_path / "w.safetensors")
    path = make_checkpoint("llama-tied").path
    _, trunk, top = load_split_model("llama", [2, 4], path, low_memory=True)

    report = load_weights(trunk, tmp_path / "w.safetensors")  # type: ignore[arg-type]
    of_top = load_weights(top, tmp_path / "w.safetensors")  # type: ignore[arg-type]

    wanted = tensors(trained)
    assert {name.split(".")[2] for name in report.loaded} == {"2", "3"}
    assert len(report.loaded) + len(report.elsewhere) == len(wanted) - 1
    assert "lm_head.weight" in of_top.loaded  # by the name of its twin, which is another part's
    for part in (trunk, top):
        found = tensors(part.model)  # type: ignore[union-attr]
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_parts_of_the_keys_are_asked_for_by_name(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    model = make_checkpoint("llama").unsplit()
    before = tensors(model)
    save_file({name: t + 1 for name, t in before.items()}, tmp_path / "w.safetensors")

    report = load_weights(model, tmp_path / "w.safetensors", without=["lm_head", "*.mlp.*"])

    after = tensors(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(report.loaded)
    assert set(report.skipped) == before.keys() - changed
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"} < set(report.skipped)

    one = load_weights(model, tmp_path / "w.safetensors", only="model.layers.3.")
    assert {name.split(".")[2] for name in one.loaded} == {"3"}
    assert "9 loaded" in str(one)


def test_a_skipped_head_that_is_tied_is_said_to_follow(
    trained: PreTrainedModel, tmp_path: Path
) -> None:
    torch.save(tensors(trained), tmp_path / "pretrain_32.pth")

    report = load_weights(trained, tmp_path / "pretrain_32.pth", without="lm_head")

    assert report.skipped == ("lm_head.weight",)
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_tied_tensors_of_different_values_are_refused(
    trained: PreTrainedModel, tmp_path: Path
) -> None:
    found = tensors(trained)
    found["lm_head.weight"] = found["lm_head.weight"] + 1
    torch.save(found, tmp_path / "w.pth")

    with pytest.raises(CheckpointError, match=r"different values for .*lm_head.*without="):
        load_weights(trained, tmp_path / "w.pth", strict=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.bias"), r"w\.pth does not fit the model: it lacks 1\.bias"),
        (lambda t: t.update(x=torch.ones(1)), r"the model has no place for x"),
        (
            lambda t: t.update({"0.weight": torch.ones(3, 4)}),
            r"0\.weight is \[3, 4\], the model's is \[4, 3\]",
        ),
        (
            lambda t: t.update({"0.bias": torch.ones(4, dtype=torch.int32)}),
            r"0\.bias is int32, the model's is float32",
        ),
    ],
    ids=["missing", "stranger", "shape", "dtype"],
)
def test_what_does_not_fit_changes_nothing(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = tensors(model)
    file = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    change(file)
    torch.save(file, tmp_path / "w.pth")

    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path / "w.pth")

    assert_equal(tensors(model), before)


def test_what_does_not_fit_is_reported_where_that_is_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    file = tensors(model)
    del file["1.bias"]
    torch.save({**file, "x": torch.ones(1)}, tmp_path / "w.pth")

    report = load_weights(model, tmp_path / "w.pth", strict=False)

    assert (report.missing, report.unexpected) == (("1.bias",), ("x",))
    assert not report.is_complete


def test_a_pattern_that_matches_nothing_is_mistyped(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_weights(model, tmp_path / "w.safetensors")

    with pytest.raises(
        ValueError, match=r"no tensor of .* matches lm_haed; there are bias, weight"
    ):
        load_weights(model, tmp_path / "w.safetensors", without=["lm_haed"])


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_weights(model, tmp_path / "w.safetensors")
    with torch.no_grad():
        model.weight[0, 1] = -70_000

    with pytest.raises(CheckpointError, match=r"weight has values up to 70000.*bfloat16"):
        save_weights(model, tmp_path / "w.safetensors", "float16")

    assert load_file(tmp_path / "w.safetensors")["weight"].abs().max() < 1
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]


@pytest.mark.parametrize("target", ["w.safetensors", "w.pth", "folder"])
def test_a_full_disk_leaves_what_was_there(
    trained: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    save_weights(trained, tmp_path / target)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("splitlearn_core.checkpoint.weights.write_tensors", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"No space left on device.*as it was"):
        save_weights(trained, tmp_path / target, "float16")

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_can_not_be_saved_says_why(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    packed = load_split_model("llama", [2, 4], path, parts=["trunk"], quantization="int8")[1]
    with pytest.raises(PackedWeightsError, match="int8"):
        save_weights(packed, tmp_path / "w.safetensors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"name a file instead: .*folder\.safetensors"):
        save_weights(nn.Linear(1, 1), tmp_path / "folder")
    with pytest.raises(ValueError, match="on meta: weight"):
        save_weights(nn.Linear(1, 1, bias=False, device="meta"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="a tokenizer goes into a folder"):
        save_weights(nn.Linear(1, 1), tmp_path / "w.pth", tokenizer=object())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds an adapter"):
        save_weights(make_checkpoint("llama").unsplit(), tmp_path)


def test_what_is_not_there_and_what_is_hostile(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ModelSourceError, match="no such file or folder"):
        load_weights(model, tmp_path / "none.pth")
    (tmp_path / "w.txt").touch()
    with pytest.raises(ModelSourceError, match=r"ends in \.safetensors, \.pt"):
        load_weights(model, tmp_path / "w.txt")
    torch.save({"weight": print}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        load_weights(model, tmp_path / "hostile.pth")


def test_experts_are_saved_as_published_and_read_back(tmp_path: Path) -> None:
    """Of a mixture of experts transformers holds what it fused; folders have each by itself."""
    from transformers import MixtralConfig, MixtralForCausalLM  # noqa: PLC0415 - this test's own

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config)
    wanted = tensors(model)

    saved = save_weights(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = load_weights(model, tmp_path)

    assert any("experts.2.w1.weight" in name for name in saved.tensors)
    assert_equal(tensors(again), wanted)
    assert_equal(tensors(model), wanted)
    assert report.is_complete


def test_two_ranks_save_and_load_one_model(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    ways = ("ddp", "fsdp1", "fsdp1-orig", "fsdp2")
    checkpoint = make_checkpoint("llama-tied")
    model = checkpoint.unsplit()
    (tmp_path / "model").symlink_to(checkpoint.path)
    (tmp_path / "full").touch()  # a file, where a folder would have to be
    other = {name: t + 1 for name, t in tensors(model).items() if name != "lm_head.weight"}
    save_file(other, tmp_path / "other.safetensors")

    children = [
        subprocess.Popen([sys.executable, RANK_CHILD, str(rank), "2", str(tmp_path), *ways])
        for rank in range(2)
    ]
    try:
        assert [child.wait(600) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()

    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    total = sum(p.numel() for p in model.parameters())
    for way in ways:
        trained = total - (0 if way == "fsdp1" else 97 * 32)
        for answer in (rank[way] for rank in told):
            assert (answer["total"], answer["trainable"]) == (total, trained)
            assert (answer["training"], answer["tensors"]) == (True, len(other))
            assert "File exists" in answer["error"]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / way)
        assert again.dtype is torch.float16
        assert again.config.architectures == ["LlamaForCausalLM"]
        assert_equal(tensors(again), {n: t.half() for n, t in tensors(model).items()})
        assert_equal(load_file(tmp_path / f"{way}.safetensors"), other)
