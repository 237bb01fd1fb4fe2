"""Which dtype each tensor of a part gets: the one that transformers would give it.

transformers builds a model with one dtype.  What it loads gets the dtype that the module has then:
that one, or another where the module says so.  Some architectures keep single tensors in float32
besides, whatever the others are.

Where no dtype is asked for, it is built with the checkpoint's, where that has one alone.  Where it
has several, with the one that the config names, as transformers' `dtype="auto"` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import build_glob_alternation

from splitlearn_core.loading.sources import StateDictSource, TorchFileSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from transformers import PreTrainedModel

    from splitlearn_core.loading.names import Recipe
    from splitlearn_core.loading.sources import StoredTensor, TensorSource

# What torch can have as its default.
_DEFAULTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Dtypes:
    """What is known of a part's dtypes before its tensors are looked at.

    Attributes:
        asked: The one that is asked for, if any.
        named: The one that the model's config names, if any.
        built_as: The one that the part, on meta, was built with.
    """

    asked: torch.dtype | None
    named: torch.dtype | None
    built_as: torch.dtype

    @classmethod
    def guess(cls, asked: torch.dtype | None, named: torch.dtype | None) -> Dtypes:
        """Return what is known before a part is built."""
        return cls(asked, named, torch.float32).rebuilt_as(asked or named or torch.float32)

    def rebuilt_as(self, dtype: torch.dtype) -> Dtypes:
        """Return the same for a part that is built with `dtype`, as far as torch can do that."""
        return replace(self, built_as=dtype if dtype in _DEFAULTS else torch.float32)

    def settle(self, stored: Mapping[str, StoredTensor], source: TensorSource) -> torch.dtype:
        """Return the dtype that a part which needs the `stored` tensors is to be built with."""
        return self.asked or _kept(stored, source, self.named)


def settle_each(
    part: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    stored: Mapping[str, StoredTensor],
    built_as: torch.dtype,
    dtype: torch.dtype,
) -> dict[str, StoredTensor]:
    """Return the stored tensors of a part, each with what it becomes.

    Args:
        part: Pruned, on meta; knows what it keeps in float32.
        recipes: The part's tensor -> how it gets its values.
        stored: What is known of the stored ones.
        built_as: The dtype that the part was built with.
        dtype: The one that it is to have.
    """
    targets = part.state_dict()
    is_kept = _kept_in_float32(part, dtype)
    settled = dict(stored)
    for target, recipe in recipes.items():
        # what a recipe makes has one dtype, that of the first: its twin may be in another part
        built = targets[recipe.target if recipe.target in targets else target].dtype
        becomes = dtype if built is built_as else built
        becomes = torch.float32 if is_kept(recipe.target) else becomes
        settled |= {name: replace(stored[name], becomes=becomes) for name in recipe.stored}
    return settled


def _kept(
    stored: Mapping[str, StoredTensor], source: TensorSource, named: torch.dtype | None
) -> torch.dtype:
    """Return the dtype for a part where none is asked for.

    Where some of the part's own have the dtype that the config names, other parts' files are not
    looked into; nor are torch files where the config names none: on the hub they would have to come
    here.
    """
    if isinstance(source, StateDictSource) and source.dtype is not None:
        return source.dtype
    ours = {tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point}
    if named is not None and (named in ours or not ours):
        return named
    if named is None and isinstance(source, TorchFileSource) and len(ours) == 1:
        return ours.pop()
    names = [name for name in source.names() if source.info(name).dtype.is_floating_point]
    if not names:
        return torch.float32
    first = source.info(min(names, key=lambda name: (source.where(name), name))).dtype
    several = any(source.info(name).dtype is not first for name in names)
    return (named if several else None) or first


def _kept_in_float32(part: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], Any]:
    """Return what tells which of a part's tensors stay float32 when the others are of `dtype`."""
    plan = part._get_dtype_plan(dtype)  # noqa: SLF001 - transformers' own rule
    return build_glob_alternation(list(plan))[0].search if plan else lambda _: False
