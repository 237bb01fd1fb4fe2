"""LoRA adapters on parts and whole models, there and back through peft."""

from __future__ import annotations

import errno
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from minimind_reference import Reference
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn_core import SplitCausalLM
from splitlearn_core.checkpoint import (
    active_lora,
    add_lora,
    count_parameters,
    join_adapters,
    load_lora,
    lora_disabled,
    lora_names,
    merge_lora,
    remove_lora,
    save_lora,
    save_weights,
    set_lora,
)
from splitlearn_core.errors import (
    CheckpointError,
    ModelSourceError,
    PackedWeightsError,
    StorageError,
)
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.quickstart import load_full_model, load_split_model
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from checkpoints import Checkpoint

# transformers', when peft asks it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def chain(path: Path, *points: int) -> SplitCausalLM:
    bottom, trunk, top = load_split_model("auto", points or (2, 4), path, low_memory=True)
    return SplitCausalLM(bottom, trunk, top)  # type: ignore[arg-type]


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def llama(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return make_checkpoint("llama")


@pytest.fixture
def adapter(llama: Checkpoint, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Return a trained whole model's adapter, by peft alone, and its logits."""
    model = get_peft_model(
        llama.unsplit(),
        LoraConfig(
            r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    )
    train(model)
    model.eval()
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", logits(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_new_adapter_changes_nothing_until_it_is_trained(
    make_checkpoint: Callable[..., Checkpoint], kind: str, tmp_path: Path
) -> None:
    path = make_checkpoint(kind).path
    model, untouched = chain(path), logits(chain(path))

    report = add_lora(model, rank=2, alpha=4, dropout=0.0)

    assert torch.equal(logits(model), untouched)
    counts = count_parameters(model)
    assert 0 < counts.trainable < counts.total / 4
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {module.split(".")[2] for module in report.modules} == set("012345")
    tuned = logits(model)
    save_lora(model, tmp_path / "adapter")
    whole = PeftModel.from_pretrained(make_checkpoint(kind).unsplit(), tmp_path / "adapter").eval()
    assert torch.equal(logits(whole), tuned)
    assert merge_lora(model) == ("default",)
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=0)


def test_every_part_is_trained_through_the_chain(llama: Checkpoint) -> None:
    model = chain(llama.path)
    add_lora(model, rank=2, targets="all-linear")
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}

    train(model, steps=2)

    changed = {n for n, p in model.named_parameters() if p.requires_grad and (p != before[n]).any()}
    assert {name.split(".")[0] for name in changed} == {"bottom", "trunks", "top"}
    assert all("lora_" in name for name in changed)
    assert not any("lm_head" in name for name in before)


def test_a_whole_adapter_goes_onto_parts_and_back(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    path, wanted = adapter
    parts = load_split_model("llama", [1, 4], llama.path, low_memory=True)

    folders = []
    for part in parts:
        report = load_lora(part, path)  # type: ignore[arg-type]
        assert len(report.modules) + len(report.elsewhere) == 12
        folders.append(tmp_path / part.component)  # type: ignore[union-attr]
        save_lora(part, folders[-1])  # type: ignore[arg-type]
    joined = join_adapters(folders, tmp_path / "joined")

    assert torch.equal(logits(SplitCausalLM(*parts)), wanted)  # type: ignore[arg-type]
    assert len(joined.factors) == 12
    theirs = load_file(path / "adapter_model.safetensors")
    ours = load_file(tmp_path / "joined" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    whole = PeftModel.from_pretrained(llama.unsplit(), tmp_path / "joined").eval()
    assert torch.equal(logits(whole), wanted)
    again = llama.unsplit()
    load_lora(again, tmp_path / "joined")
    assert torch.equal(logits(again), wanted)


def test_a_part_s_folder_is_one_that_peft_loads(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """Onto the whole model, without a word of what is missing: it has that part's modules alone."""
    trunk = load_split_model("llama", [2, 4], llama.path, parts=["trunk"])[1]
    load_lora(trunk, adapter[0])  # type: ignore[arg-type]
    save_lora(trunk, tmp_path / "trunk", dtype="bfloat16")  # type: ignore[arg-type]

    whole = PeftModel.from_pretrained(llama.unsplit(), tmp_path / "trunk")

    layers = {n.split(".")[4] for n, _ in whole.named_parameters() if "lora_A" in n}
    assert layers == {"2", "3"}
    stored = load_file(tmp_path / "trunk" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_several_are_switched(llama: Checkpoint, adapter: tuple[Path, torch.Tensor]) -> None:
    model = chain(llama.path)
    untouched = logits(model)
    load_lora(model, adapter[0], name="a")
    add_lora(model, rank=2, targets=["o_proj"], name="b")
    train(model)
    assert active_lora(model) == ("b",)
    of_b = logits(model)

    set_lora(model, "a")
    assert torch.equal(logits(model), adapter[1])
    set_lora(model, ["a", "b"])
    assert active_lora(model) == ("a", "b")
    assert not torch.equal(logits(model), of_b)
    with lora_disabled(model):
        assert torch.equal(logits(model), untouched)
    set_lora(model, "b")
    assert torch.equal(logits(model), of_b)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".b." in name for name in trained)
    remove_lora(model, "b")
    assert torch.equal(logits(model), untouched)
    set_lora(model, "a")
    remove_lora(model, "a")
    assert lora_names(model) == ()
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), untouched)


def test_merged_and_saved_it_is_a_model_like_any_other(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    model = llama.unsplit()
    load_lora(model, adapter[0])
    with pytest.raises(ValueError, match=r"merge them first .*merge_lora.*save_lora"):
        save_weights(model, tmp_path / "merged")
    part = load_component(llama.path, "trunk", [2, 4])
    load_lora(part, adapter[0])
    with pytest.raises(ValueError, match="merge them first"):
        part.save(tmp_path / "part")

    merge_lora(model)
    save_weights(model, tmp_path / "merged")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), adapter[1], atol=1e-5, rtol=0)
    assert torch.equal(logits(chain(tmp_path / "merged")), logits(again))


def test_the_ranks_and_scales_of_single_modules_hold(llama: Checkpoint, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.2.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 32},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(llama.unsplit(), config)
    train(model)
    model.eval()
    model.save_pretrained(tmp_path)

    ours = chain(llama.path)
    load_lora(ours, tmp_path)

    assert torch.equal(logits(ours), logits(model))


def test_half_precision_weights_have_adapters_that_can_be_trained(
    make_checkpoint: Callable[..., Checkpoint],
) -> None:
    model = chain(make_checkpoint("llama", dtype="bfloat16").path)

    add_lora(model, rank=2)

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model)
    assert losses[-1] < losses[0]


def minimind_lora(path: Path, reference: Reference, rank: int = 4) -> Path:
    """Write what MiniMind's save_lora writes: factors of the square linear layers."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, weight in reference.state().items():
        if weight.dim() == 2 and weight.shape[0] == weight.shape[1] and "embed" not in name:
            module = name.removesuffix(".weight")
            state[f"{module}.lora.A.weight"] = torch.randn(rank, 64, generator=generator) * 0.1
            state[f"{module}.lora.B.weight"] = torch.randn(64, rank, generator=generator) * 0.1
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("generation", [1, 2])
def test_minimind_s_own_adapters(tmp_path: Path, generation: int) -> None:
    reference = Reference(generation)
    torch.save(reference.state(), tmp_path / "full_sft_64.pth")
    path = minimind_lora(tmp_path / "lora" / "lora_medical_64.pth", reference)
    merged = reference.state()
    for name, a in torch.load(path, weights_only=True).items():
        if name.endswith("lora.A.weight"):
            module = name.removesuffix(".lora.A.weight")
            b = torch.load(path, weights_only=True)[f"{module}.lora.B.weight"]
            merged[f"{module}.weight"] += b @ a

    whole, _ = load_full_model(tmp_path / "full_sft_64.pth")
    report = load_lora(whole, path, name="medical")
    parts = load_split_model("minimind", [1, 3], tmp_path / "full_sft_64.pth", low_memory=True)
    for part in parts:
        load_lora(part, path)  # type: ignore[arg-type]

    assert len(report.modules) == 8
    torch.testing.assert_close(logits(whole), reference.logits(merged, IDS), atol=2e-5, rtol=1e-5)
    assert torch.equal(logits(SplitCausalLM(*parts)), logits(whole))  # type: ignore[arg-type]
    save_lora(whole, tmp_path / "peft", name="medical")
    fresh, _ = load_full_model(tmp_path / "full_sft_64.pth")
    peft = PeftModel.from_pretrained(fresh, tmp_path / "peft").eval()
    assert torch.equal(logits(peft), logits(whole))


@pytest.mark.parametrize("component", ["full", "trunk"])
def test_a_model_config_folds_an_adapter_in(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor], component: str
) -> None:
    settings = {"component": component, "split_points": [2, 4], "adapter": str(adapter[0])}
    config = ModelConfig("m", llama.path, config=settings)

    part = ModelLoader.load_from_config(config)

    by_hand = load_component(llama.path, component, [2, 4])
    load_lora(by_hand, adapter[0])
    merge_lora(by_hand)
    mine, theirs = part.state_dict(), by_hand.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(p.requires_grad for p in part.parameters())
    plain = estimate_component(llama.path, component, [2, 4])
    assert ModelLoader.estimate(config).peak_bytes > plain.peak_bytes
    with pytest.raises(ConfigError, match="excludes adapter"):
        ModelConfig.from_dict(
            {
                "model_id": "m",
                "model_path": str(llama.path),
                "config": {**settings, "quantization": "prepacked"},
            }
        )


def changed(adapter: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of an adapter whose tensors were changed."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


NAME = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({NAME: torch.ones(4, 64)}),
            r"q_proj\.lora_A\.weight is \[4, 64\], .*q_proj of this model needs \[4, 32\]: .*size",
        ),
        (lambda t: t.update({NAME: torch.ones(3, 32)}), r"\[3, 32\] and .* have no rank in common"),
        (lambda t: t.pop(NAME), r"has only .*lora_B\.weight of model\.layers\.2"),
        (
            lambda t: t.update(
                {NAME.replace("layers.2", "layers.9"): t.pop(NAME)}
                | {
                    NAME.replace("layers.2", "layers.9").replace("_A", "_B"): t.pop(
                        NAME.replace("_A", "_B")
                    )
                }
            ),
            r"for model\.layers\.9\.self_attn\.q_proj, which a llama with 6 layers has not",
        ),
        (lambda t: t.update(stranger=torch.ones(1)), r"has stranger, which is no factor"),
    ],
    ids=["size", "rank", "half", "layer", "stranger"],
)
def test_what_does_not_fit_changes_nothing(
    llama: Checkpoint,
    adapter: tuple[Path, torch.Tensor],
    tmp_path: Path,
    change: Any,
    message: str,
) -> None:
    model = chain(llama.path)
    names = [name for name, _ in model.named_parameters()]

    with pytest.raises(CheckpointError, match=message):
        load_lora(model, changed(adapter[0], tmp_path / "changed", change))

    assert [name for name, _ in model.named_parameters()] == names
    assert lora_names(model) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, r"of a 'IA3' adapter; LORA can be"),
        ({"use_dora": True}, r"asks for DoRA: .*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules beside"),
        ({"bias": "all"}, r"biases of the model"),
        ({"init_lora_weights": "pissa"}, r"a base that pissa changed"),
        ({"r": None}, r"lacks r and lora_alpha"),
    ],
)
def test_adapters_of_other_kinds_say_so(
    llama: Checkpoint,
    adapter: tuple[Path, torch.Tensor],
    settings: dict[str, Any],
    message: str,
) -> None:
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    with pytest.raises(CheckpointError, match=message):
        load_lora(llama.unsplit(), adapter[0])


def test_what_is_asked_wrongly(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    model: PreTrainedModel = llama.unsplit()
    with pytest.raises(ValueError, match=r"no module here is named as qproj; there are .*q_proj"):
        add_lora(model, targets="qproj")
    with pytest.raises(ValueError, match="rank must be a positive whole number, found 0"):
        add_lora(model, rank=0)
    with pytest.raises(ValueError, match=r"can't be called 'a\.b'"):
        add_lora(model, name="a.b")
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)
    with pytest.raises(KeyError, match="no adapter x here; there is none"):
        set_lora(model, "x")
    with pytest.raises(ModelSourceError, match=r"no adapter_config\.json is there"):
        load_lora(model, tmp_path)
    add_lora(model)
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        load_lora(model, adapter[0])
    with pytest.raises(FileExistsError, match="holds a model"):
        save_lora(model, llama.path)
    packed = load_component(llama.path, "trunk", [2, 4], quantization="prepacked")
    with pytest.raises(PackedWeightsError):
        add_lora(packed)
    with pytest.raises(CheckpointError, match="both have model"):
        join_adapters([adapter[0], shutil.copytree(adapter[0], tmp_path / "twin")], tmp_path / "o")


def test_a_tied_head_is_not_merged_into(
    make_checkpoint: Callable[..., Checkpoint],
) -> None:
    model = make_checkpoint("llama-tied").unsplit()
    with pytest.warns(UserWarning, match="tied layer"):  # peft says so itself
        add_lora(model, targets=["lm_head"])

    with pytest.raises(ValueError, match=r"lm_head\.weight, model\.embed_tokens\.weight are one"):
        merge_lora(model)


def test_what_would_not_be_finite_is_not_merged_at_all(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor]
) -> None:
    """The last layer's factors overflow: the layers before it must not have been merged."""
    model = llama.unsplit()
    load_lora(model, adapter[0])
    factors = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    with torch.no_grad():
        factors[max(factors)].fill_(float("inf"))

    with pytest.raises(CheckpointError, match=r"would not be finite .* nothing was merged"):
        merge_lora(model)

    remove_lora(model)
    assert torch.equal(logits(model), logits(llama.unsplit()))


def test_a_full_disk_leaves_the_adapter_that_was_there(
    llama: Checkpoint, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in adapter[0].iterdir()}
    model = llama.unsplit()
    load_lora(model, adapter[0])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("splitlearn_core.checkpoint.adapters.folder.write_tensors", full)
    with pytest.raises(StorageError, match=r"No space left .*as it was"):
        save_lora(model, adapter[0])

    assert {path: path.read_bytes() for path in adapter[0].iterdir()} == before


def test_a_folder_with_an_adapter_alone_names_both_ways(
    adapter: tuple[Path, torch.Tensor],
) -> None:
    with pytest.raises(ModelSourceError, match=r"no model: merge it .*adapter: FOLDER.*load_lora"):
        load_component(adapter[0], "full")
