"""Sessions of a Trunk with packed weights, in a daemon."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import SplitCausalLM
from splitlearn_core.factory import load_component
from splitlearn_manager.client import RemoteTrunk

DEMO = "builtin:demo"
POINTS = [2, 6]
KINDS = ["prepacked", "fp16", "int8"]


def trunk_config(quantization: str) -> dict[str, Any]:
    options = {"component": "trunk", "split_points": POINTS, "quantization": quantization}
    return {
        "model_id": quantization,
        "model_path": DEMO,
        "dtype": "float32",
        "config": options,
    }


def end(name: str) -> Any:
    return load_component(DEMO, name, POINTS, dtype="float32")


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 24])
def test_sessions_of_each_kind_give_what_the_part_gives_in_this_process(
    length: int, daemon: Callable[..., Any]
) -> None:
    bottom, top = end("bottom"), end("top")
    ids = torch.randint(5, 4000, (1, length), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    with daemon([trunk_config(kind) for kind in KINDS]) as address:
        for kind in KINDS:
            here = load_component(DEMO, "trunk", POINTS, dtype="float32", quantization=kind)
            expected = SplitCausalLM(bottom, here, top).generate(ids, **settings)
            with RemoteTrunk(address, kind) as trunk:
                assert trunk.dtype == torch.float32
                produced = SplitCausalLM(bottom, trunk, top).generate(ids, **settings)
            assert torch.equal(produced, expected), kind
            assert json.load(urllib.request.urlopen(f"{address}/v2/models/{kind}"))["name"] == kind


def test_a_configuration_that_can_not_be_is_refused_at_start(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "daemon.yaml"
    config = trunk_config("int8") | {"dtype": "float16"}
    file.write_text(json.dumps({"models": [config]}), encoding="utf-8")

    done = command("serve", "--config", file)

    assert done.returncode == 2
    assert "quantization int8 computes in float32 or bfloat16" in done.stderr
