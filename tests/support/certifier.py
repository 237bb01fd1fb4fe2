"""Certify an architecture: its parts must equal the unsplit model to the bit.

Checked on a small random model, in float32 on the CPU with one thread, saved and loaded as a
checkpoint with the names that the hub has: one forward, greedy generation with caches (prefill and
decode), the same for a batch padded on the left, logits of every step included; at two cuts, of
three parts and of four.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tiny_models import LAYERS, VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitlearn_core import SplitCausalLM
from splitlearn_core.builder import build_part
from splitlearn_core.families import Family
from splitlearn_core.loading.files import FolderFiles
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.opening import open_source
from splitlearn_core.plan import SplitPlan
from splitlearn_core.tracing import observe

CUTS: tuple[tuple[int, ...], ...] = ((2, 4), (1, 3, 5))
NEW_TOKENS = 6


class DifferenceError(Exception):
    """Parts and unsplit model gave different results; says where."""


def certify(
    model_type: str, family: Family | None = None, cuts: Sequence[tuple[int, ...]] = CUTS
) -> Family:
    """Return how the architecture is built, having shown that its parts are exact.

    Args:
        model_type: As in `config.json`.
        family: How it is said to be built; found out when left out.
        cuts: Split points to try.

    Raises:
        DifferenceError: The parts differ from the unsplit model.
        NotAChainError: It is not a chain of layers.
    """
    torch.set_num_threads(1)
    model = tiny_model(model_type)
    family = family or observe(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for cut in cuts:
            split = _split(Path(folder), unsplit, family, cut)
            with torch.no_grad():
                _compare(unsplit, split, str(list(cut)))
    return family


def _split(
    folder: Path, unsplit: PreTrainedModel, family: Family, cut: tuple[int, ...]
) -> SplitCausalLM:
    """Load the parts of the checkpoint in `folder` and chain them."""
    plan = SplitPlan.from_split_points(LAYERS, cut)
    placement = Placement(torch.device("cpu"))
    with closing(open_source(FolderFiles(folder))) as source:
        bottom, *trunks, top = (
            build_part(
                unsplit.config, spec, source, placement, checkpoint=str(folder), family=family
            )
            for spec in plan.components
        )
    return SplitCausalLM(bottom, trunks, top)


def _compare(unsplit: Any, split: SplitCausalLM, cut: str) -> None:
    """Run both on the same input."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    padded[1, :2] = 0
    if not torch.equal(unsplit(ids).logits, split(ids).logits):
        raise DifferenceError(f"{cut}: one forward")
    for name, mask in (("generate", torch.ones_like(ids)), ("padded generate", padded)):
        expected, produced = (_generate(model, ids, mask) for model in (unsplit, split))
        if not torch.equal(expected.sequences, produced.sequences):
            raise DifferenceError(f"{cut}: tokens of {name}")
        if not all(map(torch.equal, expected.logits, produced.logits)):
            raise DifferenceError(f"{cut}: logits of {name}")


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Generate greedily, from the same random state where a model uses one."""
    torch.manual_seed(0)
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
