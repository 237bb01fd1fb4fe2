"""Certify an architecture: its parts must equal the unsplit model to the bit.

Checked on a small random model, on the CPU with one thread, saved as transformers does and loaded
part by part through the library's own door.  In float32: one forward, greedy generation with caches
(prefill and decode), the same for a batch padded on the left, logits of every step included; each
at two cuts, of three parts and of four.  In bfloat16, at the first of them: one forward.  In both,
every parameter and buffer has the dtype and the values that it has in the unsplit model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import LAYERS, VOCABULARY, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.factory import load_component
from splitlearn_core.families import CERTIFIED, Family, architectures
from splitlearn_core.plan import SplitPlan
from splitlearn_core.tracing import observe
from splitlearn_core.uncertified import remember

DTYPES = (torch.float32, torch.bfloat16)
CUTS: tuple[tuple[int, ...], ...] = ((2, 4), (1, 3, 5))
NEW_TOKENS = 4

Answers = Mapping[str, Sequence[torch.Tensor]]
"""What a model gave, by the name of what it was asked."""


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
    remember(model_type, family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        in_table = _in_table(model_type, family)
        for dtype in DTYPES:
            full = dtype is torch.float32
            unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            tensors = tensors_of(unsplit)  # before a forward: that of one type casts a table
            expected = _ask(unsplit, generate=full)
            for cut in cuts if full else cuts[:1]:
                split = _load(Path(folder), cut, dtype, in_table=in_table)
                where = f"{dtype_name(dtype)}, {list(cut)}"
                compare_tensors(tensors, split.parts, where)
                _compare(expected, _ask(split, generate=full), where)
    return family


def compare_tensors(
    expected: Mapping[str, torch.Tensor], parts: Iterable[SplitModel], where: str = "parts"
) -> None:
    """Refuse parts with a parameter or buffer of another dtype or value than the unsplit model's.

    Args:
        expected: `tensors_of` the unsplit model.
        parts: Before their first forward.
        where: Begins the message.

    Raises:
        DifferenceError: Names it, and both dtypes.
    """
    for part in parts:
        for name, tensor in tensors_of(part.model).items():
            wanted = expected[name]
            if tensor.dtype is not wanted.dtype:
                raise DifferenceError(f"{where}: {name} is {tensor.dtype}, not {wanted.dtype}")
            if not torch.equal(tensor.nan_to_num(), wanted.nan_to_num()):
                raise DifferenceError(f"{where}: {name} has other values")


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and buffers, stored or not, by all their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for name, tensor in (*parameters, *buffers)}


def _in_table(model_type: str, family: Family) -> bool:
    """Whether the table says the same of the architecture."""
    known = architectures().get(model_type)
    return known is not None and known.status == CERTIFIED and known.family == family


def _load(
    folder: Path, cut: tuple[int, ...], dtype: torch.dtype, *, in_table: bool
) -> SplitCausalLM:
    """Load the parts of the checkpoint in `folder` and chain them."""
    names = SplitPlan.from_split_points(LAYERS, cut).names
    bottom, *trunks, top = (
        load_component(folder, name, cut, dtype=dtype, allow_uncertified=not in_table)
        for name in names
    )
    return SplitCausalLM(bottom, trunks, top)


def _ask(model: Any, *, generate: bool) -> Answers:
    """Return what a model gives for the inputs, which are always the same."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    padded[1, :2] = 0
    with torch.no_grad():
        forward = {"one forward": [model(ids).logits]}
        if not generate:
            return forward
        return {
            **forward,
            "generate": _generate(model, ids, torch.ones_like(ids)),
            "padded generate": _generate(model, ids, padded),
        }


def _compare(expected: Answers, produced: Answers, cut: str) -> None:
    """Refuse answers that are not equal to the bit."""
    for name, tensors in expected.items():
        same = len(tensors) == len(produced[name])
        if not (same and all(map(torch.equal, tensors, produced[name]))):
            raise DifferenceError(f"{cut}: {name}")


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Generate greedily, from the same random state where a model uses one.

    Returns:
        The logits of every step, and the tokens.
    """
    torch.manual_seed(0)
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [*output.logits, output.sequences]
