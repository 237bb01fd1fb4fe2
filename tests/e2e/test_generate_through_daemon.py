"""Generate through a Trunk in another process: the same tokens as the unsplit model."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TextStreamer

from splitlearn_core import SplitCausalLM
from splitlearn_core.quickstart import load_bottom_model, load_tokenizer, load_top_model
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.errors import RemoteError

ARGUMENTS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 30},
}


def trunk_config(model_id: str, path: Path, cut: list[int]) -> dict[str, Any]:
    return {
        "model_id": model_id,
        "model_path": str(path),
        "config": {"component": "trunk", "split_points": cut},
    }


def test_every_family_greedy_and_sampled_padded_and_not(
    make_checkpoint: Callable[..., Any], daemon: Callable[..., Any]
) -> None:
    checkpoints = {kind: make_checkpoint(kind) for kind in ("gpt2", "qwen2-tied", "llama")}
    models = [trunk_config(kind, c.path, [2, 4]) for kind, c in checkpoints.items()]
    ids = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    padded[1, :2] = 0
    with daemon(models) as address:
        for kind, checkpoint in checkpoints.items():
            unsplit = checkpoint.unsplit()
            bottom = load_bottom_model("auto", 2, checkpoint.path)
            top = load_top_model("auto", 4, checkpoint.path)
            with RemoteTrunk(address, kind) as trunk:
                split = SplitCausalLM(bottom, trunk, top)
                for name, arguments in ARGUMENTS.items():
                    for mask in (torch.ones_like(ids), padded):
                        settings = {"attention_mask": mask, "max_new_tokens": 10, **arguments}
                        torch.manual_seed(3)
                        expected = unsplit.generate(ids, pad_token_id=0, **settings)
                        torch.manual_seed(3)
                        produced = split.generate(ids, pad_token_id=0, **settings)
                        assert torch.equal(produced, expected), (kind, name)
                one = split.generate(ids[:1], max_new_tokens=10, do_sample=False, pad_token_id=0)
                same = unsplit.generate(ids[:1], max_new_tokens=10, do_sample=False, pad_token_id=0)
                assert torch.equal(one, same)
                with torch.no_grad():
                    assert torch.equal(split(ids).logits, unsplit(ids).logits)


def test_sessions_end_with_their_generation(
    make_checkpoint: Callable[..., Any], daemon: Callable[..., Any]
) -> None:
    checkpoint = make_checkpoint("llama")
    with daemon([trunk_config("trunk", checkpoint.path, [2, 4])], max_sessions=2) as address:
        bottom = load_bottom_model("auto", 2, checkpoint.path)
        top = load_top_model("auto", 4, checkpoint.path)
        with RemoteTrunk(address, "trunk") as trunk:
            split = SplitCausalLM(bottom, trunk, top)
            for _ in range(5):  # more generations than there may be sessions
                split.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, pad_token_id=0)


def test_beyond_the_models_positions(
    make_checkpoint: Callable[..., Any], daemon: Callable[..., Any]
) -> None:
    checkpoint = make_checkpoint("gpt2")
    config = trunk_config("trunk", checkpoint.path, [2, 4])
    with daemon([config]) as address, RemoteTrunk(address, "trunk") as trunk:
        cache = trunk.new_cache()
        trunk(torch.zeros(1, 60, 32), past_key_values=cache)
        with pytest.raises(RemoteError, match="64"):
            trunk(torch.zeros(1, 5, 32), past_key_values=cache)
        trunk(torch.zeros(1, 4, 32), past_key_values=cache)
        assert cache.get_seq_length() == 64


def test_pipeline_from_the_command_line(
    daemon: Callable[..., Any], command: Callable[..., Any], tmp_path: Path
) -> None:
    trunk = {
        **trunk_config("trunk", Path("builtin:demo"), [2, 6]),
        "dtype": "float32",
        "warmup": True,
    }
    client = tmp_path / "client.yaml"
    with daemon([trunk]) as address:
        options = {"split_points": [2, 6], "trunk": address, "trunk_model_id": "trunk"}
        pipeline = {
            "model_id": "demo",
            "model_path": "builtin:demo",
            "model_type": "pipeline",
            "dtype": "float32",
            "config": options,
        }
        client.write_text(yaml.safe_dump({"models": [pipeline]}))
        arguments = ("--config", client, "--prompt", "The function returns", "--max-new-tokens", 12)
        printed = command("generate", *arguments)
        reported = command("generate", *arguments, "--json")
        with urllib.request.urlopen(f"{address}/v2/models/trunk", timeout=10) as reply:
            described = json.load(reply)

    assert printed.returncode == 0, printed.stderr
    result = json.loads(reported.stdout)
    assert printed.stdout.strip() == result["text"].strip()
    assert result["text"].startswith("The function returns")
    assert result["new_tokens"] == 12
    assert result["bytes_sent"] > 0
    assert described["properties"]["start_layer"] == "2"
    assert "tokens/s" in printed.stderr


def test_streamers_work(daemon: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer("builtin:demo")
    trunk = {**trunk_config("trunk", Path("builtin:demo"), [2, 6]), "dtype": "float32"}
    with daemon([trunk]) as address:
        bottom = load_bottom_model("auto", 2, "builtin:demo", dtype="float32")
        top = load_top_model("auto", 6, "builtin:demo", dtype="float32")
        with RemoteTrunk(address, "trunk") as remote:
            split = SplitCausalLM(bottom, remote, top)
            inputs = tokenizer("Return the", return_tensors="pt")
            ids = split.generate(
                **inputs, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer)
            )

    assert tokenizer.decode(ids[0]).strip() == capsys.readouterr().out.strip()
