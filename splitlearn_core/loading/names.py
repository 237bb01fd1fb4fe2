"""Whose tensor is it: from a checkpoint's names to the names that the model's modules have.

transformers renames checkpoint keys when it loads (prefixes added or dropped, old names brought up
to date), and converts some: it fuses the tensors of single experts, or splits a fused one.  The
same rules are applied here to names alone, so that a part knows what to read before anything is
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from splitlearn_core.collector import collector_paused
from splitlearn_core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Recipe:
    """How stored tensors become one tensor of the model, or several.

    Attributes:
        target: The model's tensor; the first, where the rule makes several.
        targets: All of them.
        stored: The checkpoint's names, in the order in which transformers takes them.
        patterns: For each stored name the converter's pattern that it matched.
        converter: transformers' rule; `None` where the stored tensor is taken as it is.
    """

    target: str
    targets: tuple[str, ...]
    stored: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: Any = None


@dataclass(frozen=True)
class NameMap:
    """A checkpoint's names, sorted by what they are for.

    Attributes:
        recipes: The model's tensor -> how the checkpoint gives it its values.
        unknown: Names in the checkpoint that nothing in the model, and no known rule, explains.
        ties: The model's tensor -> the one whose values it shares, where the config ties them.
    """

    recipes: Mapping[str, Recipe]
    unknown: tuple[str, ...]
    ties: Mapping[str, str]

    def find(self, target: str) -> Recipe | None:
        """Return what gives `target` its values: its own recipe, or its tied twin's."""
        if target in self.recipes:
            return self.recipes[target]
        origin = self.ties.get(target, target)
        twins = [origin, *(t for t, o in self.ties.items() if o == origin)]
        return next((self.recipes[twin] for twin in twins if twin in self.recipes), None)


# Tables and masks that older releases stored, and newer ones compute.
LEGACY = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)(attn|attention)\.masked_bias$")


def map_names(model: PreTrainedModel, names: Iterable[str], checkpoint: str) -> NameMap:
    """Map a checkpoint's `names` onto the tensors of the unsplit `model` (which may be on meta).

    `checkpoint` names it in errors.

    Raises:
        CheckpointError: Two names stand for the same tensor.
    """
    rules = Rules(model)
    known_extras = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = [re.compile(pattern) for pattern in (*LEGACY, *known_extras)]
    recipes: dict[str, Recipe] = {}
    unknown: list[str] = []
    for name in _in_order(names):
        target, pattern = rules.rename(name)
        if target in rules.targets:
            if (other := _add(recipes, name, target, pattern, rules)) is not None:
                raise CheckpointError(f"{checkpoint}: {other} and {name} both claim to be {target}")
        elif not any(known.search(name) for known in ignored):
            unknown.append(name)
    return NameMap(recipes, tuple(unknown), dict(model.all_tied_weights_keys))


def _in_order(names: Iterable[str]) -> list[str]:
    """Sort as transformers does: by the name's parts, numbers by their value.

    The keys of parts are made once each: a name's own would be ten objects, a million in all.
    """
    keys = _PartKeys()
    with collector_paused:
        return sorted(names, key=lambda name: [keys[part] for part in name.split(".")])


class _PartKeys(dict[str, Any]):
    """What transformers sorts a part of a name by."""

    def __missing__(self, part: str) -> Any:
        (key,) = dot_natural_key(part)
        self[part] = key
        return key


class Rules:
    """transformers' renamings and converters for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._has_scoped = any(rule.scope_prefix is not None for rule in self.renamings)
        self._searches = [rule.compiled_sources.search for rule in self.renamings]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {p: rule for rule in self.converters for p in rule.source_patterns}
        self.targets = model.state_dict()
        self.prefix = model.base_model_prefix

    def rename(self, name: str) -> tuple[str, str | None]:
        """Return the model's name for a stored tensor, and the converter's pattern it matched.

        A name that is the model's already, and that the rules would change into one that is not,
        stays: transformers does the same.
        """
        renamings = self.renamings if self._may_rename(name) else []
        target, pattern = rename_source_key(
            name, renamings, self.converters, self.prefix, self.targets
        )
        if target not in self.targets and name in self.targets:
            return name, None
        return target, pattern

    def _may_rename(self, name: str) -> bool:
        """Whether any renaming matches; those that are for a submodule alone always may."""
        for search in self._searches:  # a generator would take twice as long
            if search(name):
                return True
        return self._has_scoped


def _add(
    recipes: dict[str, Recipe], name: str, target: str, pattern: str | None, rules: Rules
) -> str | None:
    """Note that `name` is needed for `target`; return the name that stands for it already."""
    recipe = recipes.get(target)
    if recipe is None:
        recipe = _new_recipe(target, pattern, rules)
        recipes.update(dict.fromkeys(recipe.targets, recipe))
    elif pattern is None or recipe.converter is None:
        return recipe.stored[0]
    recipe.stored.append(name)
    recipe.patterns.append(name if pattern is None else pattern)
    return None


def _new_recipe(target: str, pattern: str | None, rules: Rules) -> Recipe:
    """Return the recipe for a tensor that is met for the first time."""
    if pattern is None:
        return Recipe(target, (target,))
    converter = rules.by_pattern[pattern]
    first, *others = converter.target_patterns
    candidates = [target, *(target.replace(first, other) for other in others)]
    targets = tuple(name for name in candidates if name in rules.targets)
    return Recipe(target, targets, converter=converter)
