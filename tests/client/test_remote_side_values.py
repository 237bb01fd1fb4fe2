"""Architectures whose layers need more than the hidden state, with the Trunk behind a daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_fakes import daemon_in_thread
from tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM

from splitlearn_core import HiddenState, SplitCausalLM
from splitlearn_core.factory import load_component
from splitlearn_manager import ModelConfig, ServerConfig
from splitlearn_manager.client import RemoteError, RemoteTrunk
from splitlearn_manager.config import DaemonConfig, ManagerLimits

POINTS = [1, 3, 5]
# Token ids; indices and router states from layer to layer; rows for layers, and shared keys.
TYPES = ["deepseek_v4", "glm_moe_dsa", "zaya", "gemma3n_text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for model_type in TYPES:
        tiny_model(model_type).save_pretrained(root / model_type)
    return {model_type: root / model_type for model_type in TYPES}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    models = tuple(
        ModelConfig(
            f"{model_type}-{number}",
            str(folder),
            warmup=True,
            config={"component": f"trunk-{number}", "split_points": POINTS},
        )
        for model_type, folder in folders.items()
        for number in range(2)
    )
    config = DaemonConfig(
        server=ServerConfig(port=0), models=models, manager=ManagerLimits(max_models=len(models))
    )
    with daemon_in_thread(config) as daemon:
        yield daemon.url


@pytest.fixture(params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def split(model_type: str, url: str, folders: dict[str, Path]) -> Iterator[SplitCausalLM]:
    """Yield a chain whose two Trunks are elsewhere."""
    ends = [load_component(folders[model_type], name, POINTS) for name in ("bottom", "top")]
    with (
        RemoteTrunk(url, f"{model_type}-0") as first,
        RemoteTrunk(url, f"{model_type}-1") as second,
    ):
        yield SplitCausalLM(ends[0], [first, second], ends[1])


@pytest.fixture
def whole(model_type: str, folders: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[model_type]).eval()


def padded_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_one_forward_is_equal_to_the_bit(split: SplitCausalLM, whole: Any) -> None:
    ids = padded_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole(ids).logits)


def test_generate_is_equal_to_the_bit(split: SplitCausalLM, whole: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    expected = whole.generate(**padded_batch(), **options)
    produced = split.generate(**padded_batch(), **options)

    assert torch.equal(produced.sequences, expected.sequences)
    assert all(map(torch.equal, produced.logits, expected.logits))


def test_no_more_crosses_than_a_part_needs(split: SplitCausalLM, model_type: str) -> None:
    """The remote part says the same as the local one would, and sends what it says."""
    first, second = split.parts[1:3]
    ids = padded_batch()["input_ids"]
    with torch.no_grad():
        sent = split.bottom(ids)
        before = first.bytes_sent
        first(sent)
        beside = first.bytes_sent - before - sent.tensor.nbytes

    declared = sum(v.dtype.itemsize * torch.Size(v.sizes).numel() for v in first.side_inputs)
    if model_type != "glm_moe_dsa":  # as many indices as there are positions, up to a limit
        assert 0 <= beside - declared * ids.numel() < 250
    assert {value.name for value in second.side_outputs} == {
        value.name for value in split.top.side_inputs if value.name not in sent.side
    } or model_type in {"glm_moe_dsa", "zaya"}


def test_what_must_go_with_it_is_missed_before_it_travels(split: SplitCausalLM) -> None:
    trunk = split.parts[1]
    with torch.no_grad():
        hidden = split.bottom(padded_batch()["input_ids"])
        wrong = {name: value[:1] for name, value in hidden.side.items()}

        with pytest.raises(ValueError, match=f"needs {trunk.side_inputs[0].name}"):
            trunk(hidden.tensor)
        with pytest.raises(ValueError, match=r"must be .* \[batch, new"):
            trunk(HiddenState(hidden.tensor, wrong))


@pytest.mark.parametrize("model_type", ["deepseek_v4"], indirect=True)
def test_token_ids_that_the_model_has_not_are_refused_and_the_session_goes_on(
    split: SplitCausalLM,
) -> None:
    trunk = split.parts[1]
    with torch.no_grad():
        hidden = split.bottom(padded_batch()["input_ids"])
        cache = trunk.new_cache()
        expected = trunk(hidden)
        wrong = HiddenState(hidden.tensor, {"input_ids": hidden.side["input_ids"] + VOCABULARY})

        with pytest.raises(RemoteError, match=f"input_ids must be 0 to {VOCABULARY - 1}"):
            trunk(wrong, past_key_values=cache)
        produced = trunk(hidden, past_key_values=cache)

    assert torch.equal(produced.tensor, expected.tensor)


@pytest.mark.parametrize("model_type", ["zaya"], indirect=True)
def test_gradients_stop_at_a_remote_part_also_for_what_goes_with_the_hidden_state(
    split: SplitCausalLM,
) -> None:
    loss = split(padded_batch()["input_ids"], labels=padded_batch()["input_ids"]).loss

    with pytest.raises(RuntimeError, match="gradients do not cross a RemoteTrunk"):
        loss.backward()
