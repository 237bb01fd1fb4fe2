"""`connect`: Bottom and Top here, read only as far as needed, and the Trunk at an address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from serving_fakes import daemon_in_thread
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core import SplitCausalLM
from splitlearn_core.headers import read_header
from splitlearn_manager import ModelConfig, ServerConfig
from splitlearn_manager.client import RemoteTrunk, RemoteUnavailable, connect
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.config.server_config import ManagerLimits

NOWHERE = "http://127.0.0.1:9"
IDS = torch.tensor([[5, 17, 42, 3, 88]])


def part(model_id: str, folder: Path, points: list[int], **changes: Any) -> ModelConfig:
    component = changes.pop("component", "trunk")
    options = {"component": component, "split_points": points}
    return ModelConfig(model_id, str(folder), config=options, **changes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    models = (
        part("trunk", tiny_checkpoint, [2, 4]),
        part("bf16", tiny_checkpoint, [2, 4], dtype="bfloat16"),
        part("first", tiny_checkpoint, [1, 3, 5], component="trunk-0"),
        part("second", tiny_checkpoint, [1, 3, 5], component="trunk-1"),
        part("whole-middle", tiny_checkpoint, [1, 5]),
        part("top", tiny_checkpoint, [2, 4], component="top"),
    )
    limits = ManagerLimits(max_models=6)
    config = DaemonConfig(server=ServerConfig(port=0), manager=limits, models=models)
    with daemon_in_thread(config) as daemon:
        yield daemon.url


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> torch.Tensor:
    return generated(AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval())


def generated(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    ids: torch.Tensor = model.generate(IDS, max_new_tokens=8, do_sample=True, pad_token_id=0)
    return ids


def test_it_is_the_unsplit_model(tiny_checkpoint: Path, url: str, expected: torch.Tensor) -> None:
    with connect(tiny_checkpoint, [2, 4], trunk=url) as model:
        assert isinstance(model, SplitCausalLM)
        assert torch.equal(generated(model), expected)
        remote = model.parts[1]
        assert isinstance(remote, RemoteTrunk)
        layers = [(p.start_layer, p.end_layer) for p in model.parts]

    assert layers == [(0, 2), (2, 4), (4, 6)]
    with pytest.raises(RuntimeError, match="was closed"):
        generated(model)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"trunk": "URL"}, [2, 4]),
        ({"trunk": "URL", "trunk_model_id": "whole-middle"}, [1, 5]),
        ({"trunk": [NOWHERE, "URL"]}, [2, 4]),
        (
            {
                "chain": [
                    {"trunk": "URL", "trunk_model_id": "first"},
                    {"trunk": [NOWHERE, "URL"], "trunk_model_id": "second"},
                ]
            },
            [1, 3, 5],
        ),
    ],
    ids=["trunk", "model id", "the second address", "chain"],
)
def test_the_cuts_follow_from_the_trunks(
    options: dict[str, Any], layers: list[int], tiny_checkpoint: Path, url: str, expected: Any
) -> None:
    with connect(tiny_checkpoint, **with_url(options, url)) as model:
        assert [p.start_layer for p in model.parts[1:]] == layers
        assert torch.equal(generated(model), expected)


def with_url(value: Any, url: str) -> Any:
    if isinstance(value, dict):
        return {key: with_url(item, url) for key, item in value.items()}
    if isinstance(value, list):
        return [with_url(item, url) for item in value]
    return url if value == "URL" else value


def test_the_dtype_is_that_of_the_trunk(tiny_checkpoint: Path, url: str) -> None:
    with connect(tiny_checkpoint, [2, 4], url, trunk_model_id="bf16") as model:
        assert model.bottom.dtype == model.top.dtype == torch.bfloat16
        assert generated(model).shape == (1, 13)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other layers": (
        {"split_points": [2, 5], "trunk": "URL"},
        r"trunk at http://.* has the layers \[2, 4\), and split_points \[2, 5\] leave it \[2, 5\)",
    ),
    "another dtype": (
        {"trunk": "URL", "dtype": "bfloat16"},
        r"trunk at http://.* computes in float32, Bottom and Top here in bfloat16",
    ),
    "dtypes within a chain": (
        {
            "chain": [
                {"trunk": "URL", "trunk_model_id": "first"},
                {"trunk": "URL", "trunk_model_id": "bf16"},
            ]
        },
        r"bf16 at .* begins with layer 2, and first at .* ends before layer 3",
    ),
    "too few Trunks": (
        {"split_points": [1, 3, 5], "trunk": "URL"},
        r"3 split points make 2 Trunk\(s\), found 1; several in a row are given as chain",
    ),
    "out of range": ({"split_points": [2, 9], "trunk": "URL"}, r"the model has 6 layers"),
    "no Trunk": ({}, "give either trunk"),
    "both": ({"trunk": "URL", "chain": [{"trunk": "URL"}]}, "give either trunk"),
    "an id beside a chain": (
        {"chain": [{"trunk": "URL"}], "trunk_model_id": "x"},
        "belongs into each item of chain",
    ),
    "an empty chain": ({"chain": []}, "chain must be a list"),
    "addresses as a chain": ({"chain": ["URL", "URL"]}, r"chain\[0\] must have a trunk"),
    "no address": ({"trunk": "localhost:8000"}, "must be an address such as http://host:8000"),
    "an unknown key": ({"chain": [{"trunk": "URL", "id": "x"}]}, "unknown key"),
    "dtype": ({"trunk": "URL", "dtype": "int4"}, "int4"),
    "quantization": ({"trunk": "URL", "quantization": "int2"}, "int2"),
}


@pytest.mark.parametrize(("options", "told"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_fit_is_named(
    options: dict[str, Any], told: str, tiny_checkpoint: Path, url: str
) -> None:
    with pytest.raises(ValueError, match=told):
        connect(tiny_checkpoint, **with_url(options, url))


def test_a_trunk_of_another_model_is_refused(url: str) -> None:
    told = (
        r"trunk at .* is of a llama of 6 layers with hidden size 32, and .*demo is a llama of 8"
        r" layers with hidden size 192"
    )
    with pytest.raises(ValueError, match=told):
        connect("builtin:demo", [2, 6], url)


def test_no_server_no_model_no_trunk(tiny_checkpoint: Path, url: str) -> None:
    with pytest.raises(RemoteUnavailable, match=r"cannot reach http://127.0.0.1:9.*; cannot reach"):
        connect(tiny_checkpoint, [2, 4], [NOWHERE, NOWHERE])
    with pytest.raises(RemoteUnavailable, match="no model 'nonesuch'"):
        connect(tiny_checkpoint, [2, 4], url, trunk_model_id="nonesuch")
    with pytest.raises(RemoteUnavailable, match=r"'top' at .* is 'top', and a Trunk is needed"):
        connect(tiny_checkpoint, [2, 4], url, trunk_model_id="top")
    with pytest.raises(FileNotFoundError):
        connect("/no/such/folder", [2, 4], url)


def test_nothing_is_left_open_when_it_fails(
    tiny_checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(RemoteTrunk, "close", lambda self: closed.append(self.model_id))

    with pytest.raises(ValueError, match="cut where the Trunk does"):
        connect(tiny_checkpoint, [3, 4], url)

    assert closed == ["trunk"]


def test_progress_is_told_of_each_end(tiny_checkpoint: Path, url: str) -> None:
    seen: list[tuple[int, int]] = []
    with connect(tiny_checkpoint, [2, 4], url, progress=lambda *told: seen.append(told)):
        pass

    ends = [told for told in seen if told[0] == told[1]]
    assert len({total for _, total in ends}) == 2


def test_a_bar_is_shown_where_it_is_asked_for(
    tiny_checkpoint: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for wish, shown in ((None, False), (False, False), (True, True)):
        with connect(tiny_checkpoint, [2, 4], url, progress=wish):
            assert ("bottom" in capsys.readouterr().err) is shown


def test_from_a_hub_only_the_ends_are_fetched(
    tiny_checkpoint: Path,
    url: str,
    expected: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with LoopbackHub({"some/model": tiny_checkpoint}).run() as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
        with connect("some/model", [2, 4], url, cache_dir=tmp_path) as model:
            assert torch.equal(generated(model), expected)
            kept = model.bottom.nbytes + model.top.nbytes
        header = read_header(tiny_checkpoint / "model.safetensors")
        first = min(info.start for info in header.values())

        assert hub.weights_sent < kept + 4 * first + 4096
        whole = (tiny_checkpoint / "model.safetensors").stat().st_size
        assert whole - hub.weights_sent > 0.2 * whole


def test_the_name_is_there_without_torch() -> None:
    code = (
        "import sys\n"
        "import splitlearn_manager.client as client\n"
        "assert 'connect' in client.__all__\n"
        "assert 'torch' not in sys.modules\n"
        "from splitlearn_manager.client import connect\n"
        "from splitlearn_manager.client import connect as again\n"
        "assert callable(connect) and connect is again\n"
        "assert callable(client.connect)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_tied_embeddings_are_at_both_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    daemon_config = DaemonConfig(
        server=ServerConfig(port=0), models=(part("trunk", tmp_path, [1, 3]),)
    )
    with daemon_in_thread(daemon_config) as daemon, connect(tmp_path, trunk=daemon.url) as model:
        assert torch.equal(generated(model), generated(whole))
