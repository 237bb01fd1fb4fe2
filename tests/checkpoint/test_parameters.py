"""Counting parameters: of whole models, parts, and what people wrap them in."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import splitlearn_core.checkpoint
from splitlearn_core.checkpoint import count_parameters
from splitlearn_core.quickstart import load_split_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpoints import Checkpoint


def test_public_names() -> None:
    for name in splitlearn_core.checkpoint.__all__:
        assert getattr(splitlearn_core.checkpoint, name) is not None


def test_the_package_imports_no_torch_by_itself() -> None:
    code = "import sys, splitlearn_core.checkpoint; sys.exit('torch' in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tied_head_counts_once(make_checkpoint: Callable[..., Checkpoint]) -> None:
    tied = make_checkpoint("llama-tied").unsplit()
    untied = make_checkpoint("llama").unsplit()

    table = untied.get_output_embeddings().weight.numel()  # type: ignore[union-attr, operator]

    assert count_parameters(untied).total == count_parameters(tied).total + table
    assert count_parameters(tied).total == sum(p.numel() for p in tied.parameters())


def test_what_is_frozen_is_not_trainable(make_checkpoint: Callable[..., Checkpoint]) -> None:
    model = make_checkpoint("llama").unsplit()
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)  # type: ignore[union-attr]

    counts = count_parameters(model)

    assert counts.trainable == 97 * 32
    assert counts.frozen == counts.total - counts.trainable
    assert str(counts) == f"{counts.total:,} parameters, 3,104 trainable (5.89 %)"


def test_the_parts_of_an_untied_model_add_up(make_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = make_checkpoint("llama")
    parts = load_split_model("llama", [2, 4], checkpoint.path)

    assert sum(count_parameters(part).total for part in parts) == (  # type: ignore[arg-type]
        count_parameters(checkpoint.unsplit()).total
    )


@pytest.mark.parametrize("quantization", ["prepacked", "int8"])
def test_packed_weights_count_as_what_they_stand_for(
    make_checkpoint: Callable[..., Checkpoint], quantization: str
) -> None:
    path = make_checkpoint("llama").path
    plain = load_split_model("llama", [2, 4], path, parts=["trunk"])[1]
    packed = load_split_model("llama", [2, 4], path, parts=["trunk"], quantization=quantization)[1]

    assert count_parameters(packed).total == count_parameters(plain).total  # type: ignore[arg-type]
    assert count_parameters(packed).trainable == 0  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_counts_as_the_one_within(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    assert count_parameters(wrap(nn.Linear(3, 2))).total == 8
