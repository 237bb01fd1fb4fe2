"""A MiniMind folder is served by a real daemon, and text-less generation goes through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from minimind_reference import Reference

from splitlearn_core import SplitCausalLM
from splitlearn_core.quickstart import load_full_model, load_split_model
from splitlearn_manager.client import RemoteTrunk

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path


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
