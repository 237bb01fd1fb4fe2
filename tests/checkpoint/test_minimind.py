"""MiniMind's files as the Hugging Face models that they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from minimind_reference import Reference
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.checkpoint import MiniMindName, load_weights, read_training_file
from splitlearn_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from splitlearn_core.factory import load_component
from splitlearn_core.quickstart import load_full_model, load_split_model, load_tokenizer
from splitlearn_core.verify import verify
from splitlearn_manager.cli import app
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import ConfigError

IDS = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(3))
DEMO = Path(__file__).parents[2] / "splitlearn_core" / "builtin" / "demo"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write(folder: Path, reference: Reference, name: str, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(reference.state(**options), folder / name)
    return folder / name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pretrain_512.pth", MiniMindName("pretrain", 512)),
        ("full_sft_768_moe.pth", MiniMindName("full_sft", 768, is_moe=True)),
        ("ppo_actor_512.pth", MiniMindName("ppo_actor", 512)),
        ("full_sft_640_moe_resume.pth", MiniMindName("full_sft", 640, True, True)),
        ("lora_medical_512.pth", MiniMindName("lora_medical", 512)),
    ],
)
def test_names_say_what_is_in_the_file(name: str, said: MiniMindName) -> None:
    assert MiniMindName.parse(name) == said
    assert said.file_name == name
    assert said.is_lora == name.startswith("lora")


@pytest.mark.parametrize("name", ["model.pth", "512.pth", "pretrain_512.txt", "Pretrain_0.pth"])
def test_other_names_say_nothing(name: str) -> None:
    assert MiniMindName.parse(name) is None


GENERATIONS = {
    "dense": (Reference(), "llama", {}),
    "experts": (Reference(experts=4), "granitemoeshared", {}),
    "two-shared": (Reference(experts=4, shared=2), "granitemoeshared", {}),
    "none-shared": (
        Reference(experts=4, shared=0, chosen=3),
        "granitemoeshared",
        {"num_experts_per_tok": 3},
    ),
    "first": (Reference(1), "llama", {}),
    "first-16-heads": (Reference(1, heads=16, kv_heads=8, theta=1e4), "llama", {}),
    "first-experts": (Reference(1, experts=4), "granitemoeshared", {}),
    "newest": (Reference(3, kv_heads=4, eps=1e-6), "qwen3", {}),
    "newest-experts": (Reference(3, kv_heads=4, eps=1e-6, experts=4, chosen=1), "qwen3_moe", {}),
    "other-heads": (
        Reference(heads=4, kv_heads=1, theta=1e4, eps=1e-3),
        "llama",
        {"num_attention_heads": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-3},
    ),
}


@pytest.mark.parametrize("kind", GENERATIONS)
def test_every_generation_computes_what_its_own_forward_does(tmp_path: Path, kind: str) -> None:
    """Within what the order of float32 sums makes; the parts to the bit what the whole does."""
    reference, model_type, options = GENERATIONS[kind]
    path = write(tmp_path, reference, "pretrain_64.pth")
    wanted = reference.logits(reference.state(), IDS)

    whole, _ = load_full_model(path, minimind=options)
    parts = load_split_model("minimind", [1, 3], path, low_memory=True, minimind=options)

    assert whole.config.model_type == model_type
    torch.testing.assert_close(logits(whole), wanted, atol=2e-5, rtol=1e-5)
    assert torch.equal(logits(SplitCausalLM(*parts)), logits(whole))  # type: ignore[arg-type]


def test_a_dense_model_is_the_same_llama_to_the_bit(tmp_path: Path) -> None:
    state = Reference().state(dtype=torch.float16)
    path = write(tmp_path, Reference(), "full_sft_64.pth", dtype=torch.float16)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", state_dict=None)
    theirs.load_state_dict(state)

    for low_memory in (True, False):
        parts = load_split_model("minimind", [1, 3], path, low_memory=low_memory)
        assert parts[0].dtype is torch.float16  # type: ignore[union-attr]
        assert torch.equal(logits(SplitCausalLM(*parts)), logits(theirs))  # type: ignore[arg-type]
    report = verify(path, [1, 3], model_type="minimind")
    assert report.passed


def test_a_head_of_its_own_stays_apart(tmp_path: Path) -> None:
    state = Reference().state()
    state["lm_head.weight"] = state["lm_head.weight"] * 2
    torch.save(state, tmp_path / "dpo_64.pth")

    whole, _ = load_full_model(tmp_path / "dpo_64.pth")

    assert not whole.config.tie_word_embeddings
    torch.testing.assert_close(logits(whole), Reference().logits(state, IDS), atol=2e-5, rtol=1e-5)


def test_names_of_wrappers_and_tables_are_no_obstacle(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in Reference().state().items()}
    state["module.model.freqs_cos"] = torch.ones(8, 8)
    torch.save(state, tmp_path / "grpo_64.pth")
    plain = write(tmp_path, Reference(), "pretrain_64.pth")

    assert torch.equal(
        logits(load_full_model(tmp_path / "grpo_64.pth")[0]), logits(load_full_model(plain)[0])
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a folder as MiniMind's: `out` with weights, `model` with the tokenizer."""
    write(tmp_path / "out", Reference(), "full_sft_64.pth", dtype=torch.float16)
    (tmp_path / "out" / "lora").mkdir()
    torch.save({}, tmp_path / "out" / "lora_medical_64.pth")
    (tmp_path / "model").mkdir()
    for path in DEMO.glob("token*"):
        shutil.copy(path, tmp_path / "model")
    return tmp_path


def test_a_folder_with_its_tokenizer_beside(repository: Path, tmp_path: Path) -> None:
    whole, tokenizer = load_full_model(repository, model_type="minimind")
    named, _ = load_full_model(repository / "out" / "full_sft_64.pth")

    assert tokenizer is not None
    assert torch.equal(logits(whole), logits(named))
    write(tmp_path / "out", Reference(), "pretrain_64.pth")
    with pytest.raises(ModelSourceError, match=r"several MiniMind models: full_sft_64\.pth, pre"):
        load_full_model(repository, model_type="minimind")
    with pytest.raises(ModelSourceError, match=r"no MiniMind model in .*full_sft_512"):
        load_full_model(repository / "model", model_type="minimind")


def test_no_tokenizer_is_taken_from_afar(tmp_path: Path) -> None:
    """Above a folder that is not MiniMind's, whatever lies there is another's."""
    path = write(tmp_path / "weights", Reference(), "full_sft_64.pth")
    for file in DEMO.glob("token*"):
        shutil.copy(file, tmp_path)

    assert load_tokenizer(path) is None


def test_minimind_s_own_config_tells_what_the_weights_do_not(tmp_path: Path) -> None:
    reference = Reference(heads=4, kv_heads=1)
    save_file(reference.state(), tmp_path / "model.safetensors")
    config = {
        "model_type": "minimind",
        "auto_map": {"AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"},
        "num_attention_heads": 4,
        "rope_theta": 1e6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    whole, _ = load_full_model(tmp_path)

    assert whole.config.num_attention_heads == 4
    torch.testing.assert_close(
        logits(whole), reference.logits(reference.state(), IDS), atol=2e-5, rtol=1e-5
    )


def training_file(path: Path) -> Path:
    """Write what MiniMind's lm_checkpoint writes, with a real optimizer's state."""
    state = Reference().state(dtype=torch.float16)
    weights = [torch.nn.Parameter(tensor.float()) for tensor in state.values()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    data = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "epoch": 1,
        "step": 1500,
        "world_size": 4,
        "wandb_id": "abc123",
        "note": "by hand",
    }
    torch.save(data, path)
    return path


def test_a_resume_file_is_a_model_and_what_trains_it(tmp_path: Path) -> None:
    path = training_file(tmp_path / "full_sft_64_resume.pth")
    plain = write(tmp_path, Reference(), "full_sft_64.pth", dtype=torch.float16)

    file = read_training_file(path)
    whole, _ = load_full_model(path)

    assert (file.epoch, file.step, file.world_size, file.run_id) == (1, 1500, 4, "abc123")
    assert set(file.states) == {"optimizer", "scaler"}
    assert file.values == {"note": "by hand"}
    assert file.states["optimizer"]["param_groups"][0]["lr"] == 1e-3
    assert torch.equal(logits(whole), logits(load_full_model(plain)[0]))
    assert load_weights(whole, path).is_complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "many"}, r"step is 'many', no number"),
        ({"world_size": 0}, r"world_size is 0"),
        ({"model": {"w": 3}}, r"holds more than tensors: w"),
        ({"optimizer": print}, r"not a plain state dict"),
    ],
)
def test_a_damaged_or_hostile_resume_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "step": 1, **change}, tmp_path / "r.pth")

    with pytest.raises(CheckpointError, match=message):
        read_training_file(tmp_path / "r.pth")


def test_weights_alone_are_no_resume_file(tmp_path: Path) -> None:
    path = write(tmp_path, Reference(), "full_sft_64.pth")

    with pytest.raises(CheckpointError, match="weights alone are for load_weights"):
        read_training_file(path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_attention_heads": 7}, CheckpointError, r"7 heads .*don't go with 64 rows of q_proj"),
        ({"num_key_value_heads": 3}, CheckpointError, r"3 key-value heads don't go with"),
        ({"hidden_size": 512}, CheckpointError, r"has hidden_size 64; hidden_size 512 was given"),
        ({"heads": 8}, ValueError, r"minimind does not take heads; it takes bos_token_id"),
        ({"rope_theta": "big"}, ValueError, r"rope_theta can't be 'big'"),
        ({"num_attention_heads": True}, ValueError, r"num_attention_heads can't be True"),
    ],
)
def test_what_is_given_must_go_with_the_file(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = write(tmp_path, Reference(), "full_sft_64.pth")

    with pytest.raises(error, match=message):
        load_component(path, "full", minimind=options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.layers.2.mlp.up_proj.weight"),
            r"lacks tensors that are needed: model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda s: [s.pop(n) for n in list(s) if ".layers.1." in n],
            r"lacks layers 1",
        ),
        (lambda s: s.update({"model.more.weight": torch.ones(1)}), r"has a place for: model\.more"),
        (
            lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}),
            r"up_proj\.weight .*is \[2, 2\], the config needs \[192, 64\]",
        ),
        (lambda s: s.pop("model.embed_tokens.weight"), r"is no MiniMind model"),
    ],
    ids=["tensor", "layer", "stranger", "shape", "table"],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    state = Reference().state()
    change(state)
    torch.save(state, tmp_path / "full_sft_64.pth")

    with pytest.raises(CheckpointError, match=message):
        load_split_model("minimind", [1, 3], tmp_path / "full_sft_64.pth", low_memory=True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_experts_per_tok": 1}, "weighs its one expert by"),
        ({"norm_topk_prob": False}, "does not normalise"),
    ],
)
def test_experts_that_transformers_has_no_architecture_for(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    path = write(tmp_path, Reference(experts=4), "full_sft_64_moe.pth")

    with pytest.raises(UnsupportedModelError, match=why):
        load_component(path, "full", minimind=options)


def test_options_are_for_minimind_alone() -> None:
    with pytest.raises(ModelSourceError, match="no MiniMind model in"):
        load_component("builtin:demo", "full", minimind={"num_attention_heads": 8})


def test_a_torch_file_of_another_name_is_not_taken_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, Reference(), "weights.pth")

    with pytest.raises(ModelSourceError, match=r"it has no config\.json"):
        load_component(path, "full")
    assert load_component(path, "full", model_type="minimind").component == "full"
    assert load_component(path, "full", minimind={}).component == "full"


def test_what_is_no_model_says_what_to_do(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj.lora"
    factors = {f"{module}.A.weight": torch.ones(4, 8), f"{module}.B.weight": torch.ones(8, 4)}
    torch.save(factors, tmp_path / "lora_medical_8.pth")
    training_file(tmp_path / "pretrain_64_resume.pth")

    for model_type in ("minimind", "auto"):
        with pytest.raises((CheckpointError, ModelSourceError), match="load_lora"):
            load_component(tmp_path / "lora_medical_8.pth", "full", model_type=model_type)
    with pytest.raises(ModelSourceError, match=r"pretrain_64_resume\.pth, name the file"):
        load_component(tmp_path, "full", model_type="minimind")
    write(tmp_path, Reference(), "full_sft_64.pth")
    for path, model_type in ((tmp_path, "auto"), (tmp_path / "full_sft_64.pth", "llama")):
        with pytest.raises(ModelSourceError, match="say model_type='minimind'"):
            load_component(path, "full", model_type=model_type)


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model.embed_tokens.weight": print}, tmp_path / "full_sft_64.pth")

    with pytest.raises(CheckpointError, match="not a plain state dict"):
        load_component(tmp_path / "full_sft_64.pth", "full", model_type="minimind")


def test_a_model_config_loads_a_part(repository: Path) -> None:
    path = repository / "out" / "full_sft_64.pth"
    config = ModelConfig(
        model_id="trunk",
        model_path=path,
        model_type="minimind",
        config={"split_points": [1, 3], "minimind": {"rope_theta": 1e6}},
        warmup=True,
    )
    config.validate()

    estimate = ModelLoader.estimate(config)
    part = ModelLoader.load_from_config(config)

    assert isinstance(part, SplitModel)
    assert (part.start_layer, part.end_layer) == (1, 3)
    assert part.nbytes <= estimate.peak_bytes
    with pytest.raises(ConfigError, match="minimind does not take x"):
        ModelConfig.from_dict(
            {"model_id": "m", "model_path": str(path), "config": {"minimind": {"x": 1}}}
        )


def test_the_command_line_plans_verifies_and_splits(repository: Path, tmp_path: Path) -> None:
    path = str(repository / "out" / "full_sft_64.pth")
    tail = ["--model-type", "minimind", "--minimind", "rope_theta=1e4", "--split-points", "1", "3"]

    planned = CliRunner().invoke(app, ["plan", path, *tail, "--json"])
    verified = CliRunner().invoke(app, ["verify", path, *tail, "--json"])
    split = CliRunner().invoke(app, ["split", path, *tail, "--out", str(tmp_path / "parts")])
    wrong = CliRunner().invoke(app, ["plan", path, "--minimind", "heads", "--split-points", "1"])

    assert json.loads(planned.stdout)["model_type"] == "llama"
    assert json.loads(verified.stdout)["passed"]
    assert split.exit_code == 0, split.output
    top = SplitModel.load(tmp_path / "parts" / "top")
    assert top.config.rope_parameters["rope_theta"] == 1e4
    assert (tmp_path / "parts" / "bottom" / "tokenizer.json").is_file()
    assert wrong.exit_code == 2
