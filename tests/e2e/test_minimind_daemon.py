"""A MiniMind folder is served by a real daemon, and text-less generation goes through it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from minimind_reference import Reference

from splitlearn_core import SplitCausalLM
from splitlearn_core.quickstart import load_full_model, load_split_model
from splitlearn_manager.client import RemoteTrunk

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from contextlib import AbstractContextManager

DEMO = Path(__file__).parents[2] / "splitlearn_core" / "builtin" / "demo"


def test_text_is_generated_with_the_tokenizer_beside_it_and_an_adapter(
    tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    reference = Reference(vocabulary=4096)
    for folder in ("out", "model"):
        (tmp_path / folder).mkdir()
    torch.save(reference.state(), tmp_path / "out" / "full_sft_64.pth")
    for path in DEMO.glob("token*"):
        shutil.copy(path, tmp_path / "model")
    factors = {
        "model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(2, 64),
        "model.layers.0.self_attn.q_proj.lora.B.weight": torch.ones(64, 2),
    }
    torch.save(factors, tmp_path / "lora_medical_64.pth")
    arguments = ["generate", tmp_path / "out" / "full_sft_64.pth", "--prompt", "The function"]
    arguments += ["--max-new-tokens", "6", "--minimind", "num_attention_heads=4"]

    plain = command(*arguments, "--json")
    adapted = command(*arguments, "--json", "--adapter", tmp_path / "lora_medical_64.pth")

    assert plain.returncode == 0, plain.stderr
    assert adapted.returncode == 0, adapted.stderr
    assert json.loads(plain.stdout)["text"] != json.loads(adapted.stdout)["text"]


def test_a_minimind_file_is_split_and_served(
    tmp_path: Path, daemon: Callable[..., AbstractContextManager[str]]
) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "full_sft_64.pth"
    torch.save(Reference().state(), path)
    model = {
        "model_id": "trunk",
        "model_type": "minimind",
        "model_path": str(path),
        "config": {"split_points": [1, 3], "minimind": {"num_attention_heads": 4}},
    }
    options = {"num_attention_heads": 4}
    bottom, _, top = load_split_model(
        "minimind", [1, 3], path, parts=["bottom", "top"], minimind=options
    )
    whole, _ = load_full_model(path, minimind=options)
    ids = torch.arange(7).unsqueeze(0)
    wanted = whole.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[attr-defined]

    with daemon([model]) as url, RemoteTrunk(url, "trunk") as trunk:
        split = SplitCausalLM(bottom, trunk, top)  # type: ignore[arg-type]
        found = split.generate(ids, max_new_tokens=8, do_sample=False)

    assert torch.equal(found, wanted)
