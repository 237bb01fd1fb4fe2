"""Loading from a hub: the real `huggingface_hub` client against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub

from splitlearn_core.errors import CheckpointError, ModelSourceError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.headers import read_header
from splitlearn_core.quickstart import load_full_model, load_split_model
from splitlearn_core.sharded import full_tensors, joined_group, load_sharded
from splitlearn_core.split_checkpoint import split_checkpoint
from splitlearn_core.split_model import SplitModel
from splitlearn_core.utils import ShardLoader

LOAD_TRUNK = """
import hashlib, sys
from splitlearn_core.quickstart import load_split_model
_, trunk, _ = load_split_model("llama", [2, 4], "someone/model", parts=["trunk"])
state = trunk.model.state_dict()
print(hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest())
"""


def load_trunk(**environment: str) -> subprocess.CompletedProcess[str]:
    """Load a Trunk in a process of its own: the hub client reads its settings at import."""
    return subprocess.run(
        [sys.executable, "-c", LOAD_TRUNK],
        env={**os.environ, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_says_where_the_hub_and_the_cache_are(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama", shard_size="20KB").path
    index = json.loads((path / "model.safetensors.index.json").read_text())
    needed = {f for n, f in index["weight_map"].items() if ".layers.2." in n or ".layers.3." in n}
    places = {"SPLITLEARN_CACHE_DIR": str(tmp_path / "ours"), "HF_HOME": str(tmp_path / "theirs")}

    with LoopbackHub({"someone/model": path}, token="secret").run() as hub:  # noqa: S106
        first = load_trunk(HF_ENDPOINT=hub.address, HF_TOKEN="secret", **places)  # noqa: S106
    offline = load_trunk(HF_HUB_OFFLINE="1", **places)

    state = load_component(path, "trunk", [2, 4]).model.state_dict()
    content = b"".join(state[name].numpy().tobytes() for name in sorted(state))
    assert first.returncode == 0, first.stderr
    assert first.stdout == offline.stdout == hashlib.sha256(content).hexdigest() + "\n"
    assert {file for file in hub.fetched if file.endswith(".safetensors")} == needed
    assert not list(tmp_path.glob("theirs/**/*.safetensors"))
    assert len(list(tmp_path.glob("ours/**/*.safetensors"))) == 1


@pytest.fixture
def served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractContextManager[LoopbackHub]]:
    """Return a function that makes a folder the model `someone/model` of the hub in use."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setenv("SPLITLEARN_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    @contextmanager
    def serve(path: Path, **options: Any) -> Iterator[LoopbackHub]:
        with LoopbackHub({"someone/model": path}, **options).run() as hub:
            template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "ENDPOINT", hub.address)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield hub

    return serve


def stored_bytes(path: Path, skip: str = "nothing") -> int:
    headers = [read_header(file) for file in path.glob("*.safetensors")]
    return sum(t.nbytes for header in headers for name, t in header.items() if skip not in name)


def test_all_parts_one_after_the_other_cost_the_model_once(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama-tied").path
    ids = torch.tensor([[5, 7, 11]])
    with served(path) as hub:
        parts: Any = load_split_model("llama", [2, 4], "someone/model", low_memory=True)
        (header,) = [asked.span for asked in hub.gets() if asked.span and asked.span[0] == 0]

    bottom, trunk, top = parts
    expected = make_checkpoint("llama-tied").unsplit()(ids).logits
    assert torch.equal(top(trunk(bottom(ids))).logits, expected)
    assert hub.weights_sent == stored_bytes(path) + header[1]


def test_ranks_share_what_comes_from_a_hub(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama", shard_size="20KB").path
    store = f"file://{tmp_path}/store"
    with served(path) as hub, joined_group(store, rank=0, world_size=1):
        sharded = load_sharded("someone/model", "trunk", [2, 4], timeout=60)
        sent = hub.weights_sent
        again = load_sharded("someone/model", "trunk", [2, 4], timeout=60)
        found, second = dict(full_tensors(sharded)), dict(full_tensors(again))
        assert hub.weights_sent == sent  # they are in the cache, for the other ranks of a machine

    plain = dict(load_component(path, "trunk", [2, 4]).model.named_parameters())
    assert found.keys() == second.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(second[name], tensor)


def test_the_estimate_costs_headers_and_the_load_does_not_ask_for_them_again(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama", shard_size="20KB").path
    with served(path) as hub:
        estimate = estimate_component("someone/model", "trunk", [2, 4])
        assert all(asked.span is not None and asked.span[0] == 0 for asked in hub.gets())
        hub.asked.clear()
        trunk = load_component("someone/model", "trunk", [2, 4])
        assert all(asked.span is not None and asked.span[0] > 0 for asked in hub.gets())

    assert 0 < estimate.steady_bytes <= trunk.nbytes


@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_the_whole_model_first(
    shard_size: str | None, make_checkpoint: Callable[..., Any], served: Callable[..., Any]
) -> None:
    checkpoint = make_checkpoint("llama", shard_size=shard_size)
    ids = torch.tensor([[5, 7, 11]])
    with served(checkpoint.path) as hub:
        bottom, trunk, top = load_split_model("llama", [2, 4], "someone/model")
        model, tokenizer = load_full_model("someone/model")

    expected = checkpoint.unsplit()(ids).logits
    assert isinstance(bottom, SplitModel)
    assert isinstance(trunk, SplitModel)
    assert isinstance(top, SplitModel)
    assert torch.equal(top(trunk(bottom(ids))).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    assert tokenizer is None
    assert {asked.file for asked in hub.gets()} == {
        path.name for path in checkpoint.path.glob("*.safetensors")
    }
    assert len(hub.gets()) == len(list(checkpoint.path.glob("*.safetensors")))


def test_a_checkpoint_of_the_hub_is_split_into_folders(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any], tmp_path: Path
) -> None:
    path = make_checkpoint("llama").path
    seen: list[tuple[int, int]] = []
    with served(path) as hub:
        split_checkpoint("someone/model", [2, 4], tmp_path / "parts", progress=_into(seen))

    trunk = SplitModel.load(tmp_path / "parts" / "trunk")
    local = load_component(path, "trunk", [2, 4])
    hidden = torch.randn(1, 3, 32)
    assert torch.equal(trunk(hidden), local(hidden))
    assert len([a for a in hub.gets() if a.span and a.span[0] > 0]) <= 3 * 4, "not one a tensor"
    assert seen == sorted(seen)


def test_a_bar_is_shown_when_it_is_asked_for(
    make_checkpoint: Callable[..., Any],
    served: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served(make_checkpoint("llama").path):
        load_component("someone/model", "trunk", [2, 4])
        assert "someone/model" not in capsys.readouterr().err
        load_component("someone/model", "top", [2, 4], verbose=True)

    shown = capsys.readouterr().err
    assert "someone/model: 100%" in shown
    assert "B/s]" in shown


def test_a_token_can_be_given(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any]
) -> None:
    with served(make_checkpoint("llama").path, token="secret") as hub:  # noqa: S106
        load_component("someone/model", "trunk", [2, 4], token="secret")  # noqa: S106

    assert {asked.authorization for asked in hub.asked} == {"Bearer secret"}


def test_a_damaged_file_on_the_hub_is_named(
    damaged: Callable[..., Any], served: Callable[..., Any]
) -> None:
    path = damaged("llama", drop=("model.layers.2.mlp.up_proj.weight",)).path
    with (
        served(path) as hub,
        pytest.raises(CheckpointError, match=r"someone/model.*layers\.2\.mlp\.up_proj\.weight"),
    ):
        load_component("someone/model", "trunk", [2, 4])

    assert all(asked.span is not None and asked.span[0] == 0 for asked in hub.gets())


def test_shards_are_fetched_whole_by_name(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any]
) -> None:
    path = make_checkpoint("llama", shard_size="20KB").path
    with served(path):
        index = ShardLoader.load_index_json("someone/model")
        files = ShardLoader.get_required_shards_for_component(index, "trunk", (2, 4), "llama")
        paths = ShardLoader.download_shards_if_needed("someone/model", files)

    assert set(paths) == files
    assert all(paths[name].read_bytes() == (path / name).read_bytes() for name in files)


def _into(seen: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda done, total: seen.append((done, total))


def test_top_alone_fetches_the_generation_settings(
    damaged: Callable[..., Any], served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damaged("llama").path
    settings = path / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [7, 8]}))
    with served(path) as hub:
        load_component("someone/model", "trunk", [2, 4])
        assert settings.name not in hub.fetched
        parts = [load_component("someone/model", "top", [2, 4]) for _ in range(2)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    parts.append(load_component("someone/model", "top", [2, 4]))

    assert hub.fetched.count(settings.name) == 1
    for part in parts:
        assert part.model.generation_config.eos_token_id == [7, 8]  # type: ignore[union-attr]


def test_an_adapter_on_the_hub_is_told_for_what_it_is(
    make_checkpoint: Callable[..., Any], served: Callable[..., Any], tmp_path: Path
) -> None:
    """That there is none is asked once for each commit."""
    path = make_checkpoint("llama").path
    with served(path) as hub:
        load_component("someone/model", "trunk", [2, 4])
        assert [asked for asked in hub.asked if "adapter" in str(asked)]
        hub.asked.clear()
        load_component("someone/model", "bottom", [2, 4])
        assert not [asked for asked in hub.asked if "adapter" in str(asked)]

    for folder, names in (("adapter", ()), ("both", ("config.json", "model.safetensors"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        for name in names:
            (tmp_path / folder / name).write_bytes((path / name).read_bytes())
    with (
        served(tmp_path / "adapter"),
        pytest.raises(ModelSourceError, match="holds a PEFT adapter"),
    ):
        load_component("someone/model", "trunk", [2, 4], cache_dir=tmp_path / "one")
    with served(tmp_path / "both"), pytest.raises(CheckpointError, match="holds a PEFT adapter"):
        load_component("someone/model", "trunk", [2, 4], cache_dir=tmp_path / "two")
