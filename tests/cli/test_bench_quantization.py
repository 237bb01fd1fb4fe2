"""`splitlearn bench quantization`: a small real run, and what the figures are of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from splitlearn_manager.bench.quantization_child import (
    HELD_OUT,
    WAYS,
    _Answers,
    _compare,
    held_out_texts,
)
from splitlearn_manager.cli import app


def test_a_quick_run_has_every_row_and_no_target(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "quantization", "--quick", "--json", "--work-dir", str(tmp_path)]
    )

    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    for way in (
        "prepacked float32",
        "fp16 float32",
        "int8 float32",
        "prepacked bfloat16",
        "int8 bfloat16",
    ):
        mine = [name for name in names if f", {way}: " in name]
        assert len(mine) == 3 * 2 + 2 + 4, way
    assert all(row["value"] >= 0 and row["target"] is None for row in rows)
    by_name = {row["name"]: row["value"] for row in rows}
    assert by_name["built-in model, fp16 float32: relative error of logits"] < 1e-5
    assert 1e-4 < by_name["built-in model, int8 float32: relative error of logits"] < 0.05


def test_texts_are_those_that_the_model_was_not_trained_on() -> None:
    texts = list(held_out_texts())

    assert len(texts) > 50
    assert any(text.startswith("Parser for command line options.") for text in texts)
    assert len(HELD_OUT) == 5


def test_figures_of_an_answer_that_differs() -> None:
    ids = [torch.tensor([[0, 1, 2]])]
    plain = _Answers([torch.eye(3)[[1, 2, 0]] * 10], [[1, 2]])
    other = _Answers([torch.eye(3)[[1, 0, 0]] * 10], [[1, 0]])

    figures = _compare(other, plain, ids)

    assert figures["same"] == pytest.approx(2 / 3)
    assert figures["generated"] == 0
    assert figures["tokens"] == 2
    assert figures["error"] == pytest.approx((2 / 3) ** 0.5)
    assert figures["perplexity"] > 100 * _compare(plain, plain, ids)["perplexity"]


def test_names_of_ways_differ() -> None:
    assert len({way.name for way in WAYS}) == len(WAYS)
