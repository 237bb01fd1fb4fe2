"""Which dtype weights get where the checkpoint has several, as transformers' `dtype="auto"` does.

A checkpoint whose weights all have one dtype keeps it.  Where they have several, all get the one
that the config names.  Some architectures keep single tensors in float32 whatever the others are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import build_glob_alternation

from splitlearn_core.loading.sources import TorchFileSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.loading.names import Recipe
    from splitlearn_core.loading.sources import StoredTensor, TensorSource

_HALVES = (torch.float16, torch.bfloat16)


def settle_dtypes(
    part: PreTrainedModel,
    recipes: Iterable[Recipe],
    stored: Mapping[str, StoredTensor],
    source: TensorSource,
    named: torch.dtype | None,
) -> dict[str, StoredTensor]:
    """Return the stored tensors of a part, each with what it becomes.

    Args:
        part: Pruned, on meta; knows what it keeps in float32.
        recipes: What the tensors are for.
        stored: What is known of them.
        source: Where they lie.
        named: The dtype that the model's config names.
    """
    common = _common_dtype(stored, source, named)
    settled = dict(stored)
    if common is not None:
        settled = {name: replace(tensor, common=common) for name, tensor in stored.items()}
    for half in _HALVES:
        for name in _kept_in_float32(part, recipes, half):
            kept = settled[name].float32_in | {half}
            settled[name] = replace(settled[name], float32_in=kept)
    return settled


def _common_dtype(
    stored: Mapping[str, StoredTensor], source: TensorSource, named: torch.dtype | None
) -> torch.dtype | None:
    """Return what all become; `None` where there is only one dtype, which they keep.

    Where the part's own have the dtype that the config names, other parts' files are not looked
    into; nor are torch files where the config names none: on the hub they would have to come here.
    """
    ours = {tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point}
    unseen = named is None and isinstance(source, TorchFileSource)
    if ours <= {named} or (unseen and len(ours) == 1):
        return None
    names = [name for name in source.names() if source.info(name).dtype.is_floating_point]
    if len({source.info(name).dtype for name in names}) == 1:
        return None
    return named or source.info(min(names, key=lambda name: (source.where(name), name))).dtype


def _kept_in_float32(
    part: PreTrainedModel, recipes: Iterable[Recipe], half: torch.dtype
) -> list[str]:
    """Return the stored names of what stays float32 when the others are of dtype `half`."""
    plan = part._get_dtype_plan(half)  # noqa: SLF001 - transformers' own rule
    if not plan:
        return []
    matches = build_glob_alternation(list(plan))[0].search
    return [name for recipe in recipes if matches(recipe.target) for name in recipe.stored]
