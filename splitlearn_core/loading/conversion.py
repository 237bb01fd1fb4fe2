"""How stored tensors become the model's, where transformers fuses or splits them on reading.

Before a weight is read the conversion is tried on the meta device: a checkpoint that lacks the
tensor of one expert, or has it in another shape, is found out by its headers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.messages import in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.loading.names import Recipe
    from splitlearn_core.loading.sources import StoredTensor, TensorSource

    Shapes = dict[int, tuple[int, ...]]


def convert(
    part: PreTrainedModel, recipe: Recipe, tensors: Iterable[torch.Tensor], source: TensorSource
) -> dict[str, torch.Tensor]:
    """Return the tensors that a recipe makes of the stored ones, by the model's names.

    Args:
        part: Whose tensors are made.
        recipe: With a converter.
        tensors: In the order of `recipe.stored`.
        source: Names their file in errors.

    Raises:
        CheckpointError: They don't go together.
    """
    converter = copy.deepcopy(recipe.converter)
    for name, pattern, tensor in zip(recipe.stored, recipe.patterns, tensors, strict=True):
        converter.add_tensor(recipe.target, name, pattern, tensor)
    try:
        made = converter.convert(recipe.target, model=part, config=part.config)
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{_named(recipe, source)} can't be made into {recipe.target}: {in_one_line(error)}"
        ) from error
    return {name: _only(value) for name, value in made.items()}


def check_conversions(
    part: PreTrainedModel,
    recipes: Iterable[Recipe],
    stored: Mapping[str, StoredTensor],
    source: TensorSource,
) -> None:
    """Try the conversions of `part` (pruned, on meta) without a value.

    Layers that are alike are tried once.

    Raises:
        CheckpointError: Tensors are missing, of the wrong shape, or don't go together; names them.
    """
    targets = part.state_dict()
    tried: dict[Any, Shapes] = {}
    for recipe in {id(r): r for r in recipes if r.converter is not None}.values():
        _check_numbers(recipe, source)
        shapes = [stored[name].shape for name in recipe.stored]
        key = (id(recipe.converter), tuple(zip(recipe.patterns, shapes, strict=True)))
        if key not in tried:
            tried[key] = _try(part, recipe, shapes, source)
        _check_shapes(recipe, tried[key], targets, source)


def _try(
    part: PreTrainedModel,
    recipe: Recipe,
    shapes: Iterable[tuple[int, ...]],
    source: TensorSource,
) -> Shapes:
    """Return the shapes that a recipe makes, by the number of the target."""
    empty = (torch.empty(shape, device="meta") for shape in shapes)
    made = convert(part, recipe, empty, source)
    return {
        number: tuple(made[name].shape)
        for number, name in enumerate(recipe.targets)
        if name in made
    }


def _check_shapes(
    recipe: Recipe, made: Shapes, targets: Mapping[str, torch.Tensor], source: TensorSource
) -> None:
    """Compare what a recipe makes with what the config needs."""
    for number, shape in made.items():
        target = recipe.targets[number]
        if target in targets and shape != tuple(targets[target].shape):
            raise CheckpointError(
                f"{_named(recipe, source)} make {target} {list(shape)}, the config needs"
                f" {list(targets[target].shape)}"
            )


def _check_numbers(recipe: Recipe, source: TensorSource) -> None:
    """Refuse numbered tensors that don't count from 0 without a gap.

    They are put together in their order: without one the others would take its place.
    """
    groups: dict[str, list[str]] = {}
    for name, pattern in zip(recipe.stored, recipe.patterns, strict=True):
        groups.setdefault(pattern, []).append(name)
    for names in groups.values():
        if names != _counted(names[0], names[-1], len(names)):
            raise CheckpointError(
                f"{_named(recipe, source)}: these don't count from 0 to {len(names) - 1}, so"
                f" {recipe.target} can't be made of them"
            )


def _counted(first: str, last: str, count: int) -> list[str]:
    """Return the names that there must be, where the first and the last differ by a number."""
    if count == 1:
        return [first]
    fields = first.split(".")
    pairs = enumerate(zip(fields, last.split("."), strict=False))
    places = [place for place, (one, other) in pairs if one != other]
    if len(places) != 1:
        return []
    before = "".join(f"{field}." for field in fields[: places[0]])
    after = "".join(f".{field}" for field in fields[places[0] + 1 :])
    return [f"{before}{number}{after}" for number in range(count)]


def _named(recipe: Recipe, source: TensorSource) -> str:
    """Name a recipe's tensors and the file of the first."""
    return f"{source.where(recipe.stored[0])}: {listed(recipe.stored)}"


def _only(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Return the tensor that a converter made; some hand it over in a list."""
    return value[0] if isinstance(value, list) else value
