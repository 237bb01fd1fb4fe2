"""The samples and the tables of `docs/checkpoints.md` and `docs/adapters.md` run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from minimind_reference import Reference

import splitlearn_core.checkpoint
from splitlearn_core.inspection import inspect
from splitlearn_core.quickstart import load_full_model

DOCS = Path(__file__).parents[2] / "docs"
SAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
ROW = re.compile(r"^\| (?P<theirs>.+) \| `(?P<ours>[^`]+)` \|$", re.MULTILINE)
SMALL = Reference(hidden=512, layers=8, width=64)


@pytest.fixture
def minimind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has what MiniMind's scripts leave."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    state = SMALL.state(dtype=torch.float16)
    for folder in ("out/lora", "checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    torch.save(state, "out/full_sft_512.pth")
    model, _ = load_full_model("out/full_sft_512.pth", dtype="float32")
    own = dict(model.named_parameters())
    theirs = [own[name] for name in state if name in own]  # numbered as in MiniMind's model
    optimizer = torch.optim.AdamW(theirs, lr=1e-3)
    sum(parameter.sum() for parameter in theirs).backward()  # type: ignore[union-attr]
    optimizer.step()
    resume = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 0, "step": 1500}
    resume |= {"world_size": 1, "wandb_id": "abc123"}
    torch.save(resume, "checkpoints/pretrain_512_resume.pth")
    module = "model.layers.{}.self_attn.q_proj.lora."
    factors = {
        module.format(layer) + f"{side}.weight": torch.ones(8, 512)
        if side == "A"
        else torch.full((512, 8), 1e-3)
        for layer in range(8)
        for side in "AB"
    }
    for name in ("medical", "identity"):
        torch.save(factors, f"out/lora/lora_{name}_512.pth")
    torch.save({f"module.{n}": t for n, t in factors.items()}, "out/lora/lora_ddp_512.pth")
    return tmp_path


def known() -> dict[str, Any]:
    names = splitlearn_core.checkpoint.__all__
    return {name: getattr(splitlearn_core.checkpoint, name) for name in names} | {
        "inspect": inspect,
        "load_full_model": load_full_model,
    }


@pytest.mark.parametrize("page", ["checkpoints.md", "adapters.md"])
@pytest.mark.usefixtures("minimind")
def test_the_samples_run_one_after_the_other(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text("utf-8")
    space: dict[str, Any] = {"__name__": "sample"}

    for sample in SAMPLE.findall(text):
        exec(sample, space)  # noqa: S102 - our own

    printed = capsys.readouterr().out
    assert space["report"] is not None
    if page == "checkpoints.md":
        for promised in re.findall(r"print\((?:report|counts)\)  # (.+)", text):
            assert promised in printed


@pytest.mark.parametrize("page", ["checkpoints.md", "adapters.md"])
@pytest.mark.usefixtures("minimind")
def test_every_row_of_ours_runs(page: str) -> None:
    rows = ROW.findall((DOCS / page).read_text("utf-8").partition("Their call")[2])
    model, _ = load_full_model("out/full_sft_512.pth", dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    space = known() | {"model": model, "optimizer": optimizer}

    assert len(rows) >= 8
    for _, ours in rows:
        eval(ours, space)  # noqa: S307 - our own
