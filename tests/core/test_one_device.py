"""A part on an accelerator computes there: nothing that it makes on the way lies elsewhere.

The meta device stands for the accelerator.  It refuses sums with a tensor of the CPU as CUDA does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from splitlearn_core import HiddenState
from splitlearn_core.factory import load_component

POINTS = [2, 4]
# Types with learned positions or types of tokens, whose tables only the Bottom has; then some with
# values that cross besides the hidden state, and one with neither.
TYPES = ["bert", "ernie", "gpt_neo", "roberta", "xlm-roberta-xl", "opt"]
TYPES += ["gemma3n_text", "gemma4_text", "llama"]


@torch.no_grad()
@pytest.mark.parametrize("model_type", TYPES)
def test_parts_compute_where_they_are(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    names = ("bottom", "trunk", "top")
    bottom, trunk, top = (load_component(tmp_path, n, POINTS).to("meta") for n in names)

    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    left = trunk(bottom(ids))
    assert HiddenState.of(left).device == torch.device("meta")
    assert list(top(left).logits.shape) == [2, 5, VOCABULARY]
