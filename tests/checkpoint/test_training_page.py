"""The samples and the table of `docs/training.md` run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from minimind_reference import Reference

import splitlearn_core.checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
ROW = re.compile(r"^\| (?P<theirs>.+) \| `(?P<ours>[^`]+)` \|$", re.MULTILINE)
SMALL = Reference(hidden=512, layers=2, width=64)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has what MiniMind's script leaves."""
    monkeypatch.chdir(tmp_path)
    state = SMALL.state(dtype=torch.float16)
    weights = [p for name, p in state.items() if name != "lm_head.weight"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(w.float()) for w in weights])
    data = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 0, "step": 1500}
    Path("checkpoints").mkdir()
    data |= {"world_size": 4, "wandb_id": "abc123"}
    torch.save(data, "checkpoints/pretrain_512_resume.pth")
    return tmp_path


def test_the_samples_and_every_row_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text("utf-8")
    names = splitlearn_core.checkpoint.__all__
    space: dict[str, Any] = {name: getattr(splitlearn_core.checkpoint, name) for name in names}

    for sample in SAMPLE.findall(text):
        exec(sample, space)  # noqa: S102 - our own
    space["scaler"] = torch.amp.GradScaler("cpu")
    rows = ROW.findall(text.partition("Their call")[2])
    for _, ours in rows:
        eval(ours, space)  # noqa: S307 - our own

    assert len(rows) >= 12
    printed = capsys.readouterr().out
    assert printed.startswith("64 Batches(batch_size=4, accumulation=2, world_size=1) ()")
    assert "0 6000 abc123" in printed
    assert len(list((place / "runs" / "a").glob("0*"))) == 3
    assert space["sampler"].epoch == 1  # of the checkpoint that the page loads last


def test_the_tree_is_that_of_a_checkpoint(place: Path) -> None:
    space: dict[str, Any] = {}
    exec(SAMPLE.findall(PAGE.read_text("utf-8"))[0], space)  # noqa: S102 - our own

    newest = max((place / "runs" / "a").glob("0*"))

    tree = PAGE.read_text("utf-8").partition("runs/a/\n")[2].partition("```")[0]
    for name in re.findall(r"^ {8}(\S+)", tree, re.MULTILINE):
        assert (newest / name).is_file()
    assert (newest / "model.json").is_file()
