"""Real models cut in three, with the Trunk behind a real daemon: the same as the unsplit model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_fakes import daemon_in_thread
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from splitlearn_core import SplitCausalLM
from splitlearn_core.factory import load_component
from splitlearn_manager import ModelConfig, ServerConfig
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.config import DaemonConfig

LAYERS = 5
SPLIT_POINTS = [1, 4]
VOCABULARY = 97

ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
SIZES = {"gpt2": GPT2, "llama": ROTARY, "qwen2": ROTARY}


@dataclass(frozen=True)
class Pair:
    """A model, whole, and cut with its Trunk elsewhere."""

    whole: PreTrainedModel
    split: SplitCausalLM
    trunk: RemoteTrunk


def save_checkpoint(model_type: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **SIZES[model_type],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trunk_of(model_type: str, folder: Path) -> ModelConfig:
    options = {"component": "trunk", "split_points": SPLIT_POINTS}
    return ModelConfig(model_type, str(folder), config=options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {model_type: save_checkpoint(model_type, root / model_type) for model_type in SIZES}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    models = tuple(trunk_of(model_type, folder) for model_type, folder in folders.items())
    config = DaemonConfig(server=ServerConfig(port=0), models=models)
    with daemon_in_thread(config) as daemon:
        yield daemon.url


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest, url: str, folders: dict[str, Path]) -> Iterator[Pair]:
    folder = folders[request.param]
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    bottom, top = (load_component(folder, name, SPLIT_POINTS) for name in ("bottom", "top"))
    with RemoteTrunk(url, request.param) as trunk:
        yield Pair(whole, SplitCausalLM(bottom, trunk, top), trunk)


def prompt() -> torch.Tensor:
    return torch.tensor([[5, 17, 42, 3, 88]])


def padded_batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[0, 0, 5, 17, 42], [9, 8, 7, 6, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }


def test_one_forward_is_equal_to_the_bit(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.whole(prompt()).logits
        actual = pair.split(prompt()).logits

    assert torch.equal(actual, expected)


def test_a_padded_batch_is_equal_to_the_bit(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.whole(**padded_batch()).logits
        actual = pair.split(**padded_batch()).logits

    real = padded_batch()["attention_mask"].bool()
    assert torch.equal(actual[real], expected[real])


SETTINGS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "top_k": 20, "temperature": 0.8},
    {"do_sample": False, "use_cache": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled", "no cache"])
@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_generate_gives_the_same_tokens(pair: Pair, batch: bool, settings: dict[str, Any]) -> None:
    inputs = padded_batch() if batch else {"input_ids": prompt()}
    outputs = []
    for model in (pair.whole, pair.split):
        torch.manual_seed(7)
        outputs.append(model.generate(**inputs, max_new_tokens=8, pad_token_id=0, **settings))

    assert outputs[0].shape[1] == 13
    assert torch.equal(outputs[1], outputs[0])


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Do nothing."""


def test_tokens_are_streamed_as_they_come(pair: Pair) -> None:
    streamer = Collector()

    output = pair.split.generate(prompt(), max_new_tokens=4, do_sample=False, streamer=streamer)

    assert streamer.tokens == output[0].tolist()


def test_a_long_step_continues_a_cache_as_single_steps_do(pair: Pair) -> None:
    tokens = torch.arange(20)[None]
    cache = pair.split.new_cache()
    with torch.no_grad():
        pair.split(tokens[:, :12], past_key_values=cache)
        chunk = pair.split(tokens[:, 12:], past_key_values=cache).logits
        whole = pair.whole(tokens).logits[:, 12:]

    assert torch.allclose(chunk, whole, atol=1e-5)
    assert cache.get_seq_length() == 20


def test_no_more_positions_than_the_model_has(pair: Pair) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="position 65, the session has 64"):
        pair.trunk(torch.zeros(1, 65, 32))


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_generate(pair: Pair, way: str) -> None:
    """Rows that are reordered on the server, and positions that are taken back there."""
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([ids, ids], dim=1)
    outputs = []
    for model in (pair.whole, pair.split):
        torch.manual_seed(5)
        outputs.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **WAYS[way])
        )

    assert torch.equal(*outputs)


def test_a_model_that_does_not_count_positions_by_itself(tmp_path: Path) -> None:
    """Without their ids, transformers' Bamba lets every step begin at position 0."""
    tiny_model("bamba").save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    bottom, top = (load_component(tmp_path, name, SPLIT_POINTS) for name in ("bottom", "top"))
    config = DaemonConfig(server=ServerConfig(port=0), models=(trunk_of("bamba", tmp_path),))
    with daemon_in_thread(config) as daemon, RemoteTrunk(daemon.url, "bamba") as trunk:
        split = SplitCausalLM(bottom, trunk, top)
        settings = {"max_new_tokens": 20, "do_sample": False, "output_logits": True}
        expected, actual = (
            model.generate(prompt(), return_dict_in_generate=True, **settings)
            for model in (whole, split)
        )

    assert torch.allclose(torch.cat(actual.logits), torch.cat(expected.logits), atol=1e-5)
