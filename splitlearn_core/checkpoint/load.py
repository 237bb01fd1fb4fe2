"""Load weights into a model that is there already, and tell of every tensor what became of it."""

from __future__ import annotations

import copy
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from splitlearn_core.checkpoint.models.load_report import LoadReport
from splitlearn_core.checkpoint.models.model_folder import architecture_of
from splitlearn_core.checkpoint.models.model_state import identity, modules_of, stored_tensors
from splitlearn_core.checkpoint.models.plain_names import plain_name, plain_names
from splitlearn_core.checkpoint.models.selection import Selection
from splitlearn_core.checkpoint.models.weights_file import open_weights
from splitlearn_core.checkpoint.models.wrappers import fsdp1_modules
from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import CheckpointError
from splitlearn_core.headers import listed
from splitlearn_core.loading.conversion import check_conversions, convert
from splitlearn_core.loading.names import NameMap, Recipe, map_names
from splitlearn_core.skeleton import build_skeleton

if TYPE_CHECKING:
    import os
    from collections.abc import Container, Iterable, Iterator, Mapping

    from splitlearn_core.loading.sources import TensorSource

# What peft puts into the names of the tensors that an adapter goes beside.
_BASE_LAYER = ".base_layer"
_ADAPTER = ".lora_"


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    only: Iterable[str] | str | None = None,
    without: Iterable[str] | str = (),
    strict: bool = True,
) -> LoadReport:
    """Load weights into `model`, or those of them that are asked for.

    All names, shapes and dtypes are compared before the first value is changed.  Values are cast to
    the model's dtypes and go to its devices; a model on several ranks is given its shares, where
    every rank calls this (with FSDP1 each has the whole model meanwhile).  Of a part only its own
    tensors are read.

    Args:
        model: A part, a chain of parts that are all here, transformers' model, or any module; it
            may be wrapped.
        path: A `.safetensors`, `.pth`, `.pt` or `.bin` file, or a folder; see `open_weights`.
        only: Load nothing but what matches one of these: names, prefixes up to a dot (`lm_head`),
            or globs (`*.self_attn.*`).
        without: Leave out what matches one of these.
        strict: Refuse a file that lacks tensors of the model, or has strangers, where they were
            not left out by name.  Otherwise the report tells of them.

    Returns:
        What became of each tensor.

    Raises:
        ModelSourceError: (a `FileNotFoundError`) There is no such file.
        CheckpointError: (a `ValueError`) It is damaged; tensors have other shapes than the model's
            or are whole numbers where it has weights; with `strict`, names don't agree; tied
            tensors have different values.
        ValueError: A pattern matches nothing, or the model is on meta.
    """
    chosen = Selection.of(only, without)
    with closing(open_weights(path)) as source, _put_together(model):
        plan = _Plan.of(model, source, str(path))
        chosen.check([*plan.names.values(), *plan.whole], str(path))
        return plan.carry_out(chosen, strict=strict)


@dataclass(frozen=True)
class _Plan:
    """A file beside a model.

    Attributes:
        where: Names the file in messages.
        source: The file.
        names: The file's own names -> without what wrappers put in.
        mapped: What each of the whole model's tensors is made of.
        whole: The whole model's tensors; on meta where the model is a part.
        targets: The model's own tensors, by their plain names.
        skeleton: Knows how stored tensors are converted, for architectures that do that.
    """

    where: str
    source: TensorSource
    names: Mapping[str, str]
    mapped: NameMap
    whole: Mapping[str, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    skeleton: PreTrainedModel | None

    @classmethod
    def of(cls, model: nn.Module, source: TensorSource, where: str) -> _Plan:
        """Compare a file with a model."""
        modules = modules_of(model)
        skeleton = _skeleton(modules[0])
        targets = dict(_targets(modules))
        names = _plain_names(source, targets, where)
        if meta := [name for name, tensor in targets.items() if tensor.is_meta]:
            raise ValueError(
                f"the model is on meta, where no value can be put: {listed(meta)}; load it with"
                " load_component or load_split_model"
            )
        if skeleton is None:
            recipes = {n: Recipe(n, (n,), [n], [n]) for n in names.values() if n in targets}
            strangers = tuple(n for n in names.values() if n not in targets)
            return cls(
                where, source, names, NameMap(recipes, strangers, {}), targets, targets, None
            )
        mapped = map_names(skeleton, names.values(), where)
        return cls(where, source, names, mapped, skeleton.state_dict(), targets, skeleton)

    def carry_out(self, chosen: Selection, *, strict: bool) -> LoadReport:
        """Check everything, then put the values in."""
        recipes = {
            target: recipe
            for target, recipe in self._possible().items()
            if chosen.takes(target, *recipe.stored)
        }
        twins = self._twins(recipes)
        report = self._report(recipes, twins, chosen)
        if strict and not report.is_complete:
            raise CheckpointError(
                f"{self.where} does not fit the model: "
                + "; ".join(_disagreements(report))
                + ".  Leave them out by name (without=[…]), or take strict=False"
            )
        self._check_fit(recipes)
        self._check_twins(recipes)
        _fill(self.targets, self._values(recipes))
        return report

    def _possible(self) -> dict[str, Recipe]:
        """Return the model's own tensors that the file has values for.

        A tied tensor whose twin is another part's has those of the twin.
        """
        own = {t: r for t, r in self.mapped.recipes.items() if t in self.targets}
        here = {identity(self.targets[target]) for target in own}
        lent = {
            target: recipe
            for target, tensor in self.targets.items()
            if target not in own
            and identity(tensor) not in here
            and (recipe := self.mapped.find(target)) is not None
        }
        return own | lent

    def _report(
        self, recipes: Mapping[str, Recipe], twins: Mapping[str, str], chosen: Selection
    ) -> LoadReport:
        """Sort every name by what becomes of it."""
        mapped, targets = self.mapped.recipes, self.targets
        used = {name for recipe in recipes.values() for name in recipe.stored}
        known = {name for recipe in mapped.values() for name in recipe.stored}
        by_target = {n: (t, *r.stored) for t, r in mapped.items() for n in r.stored}
        left = {n for n in known - used if not chosen.takes(*by_target[n])}
        lacking = {t for t in targets if t not in recipes and t not in twins}
        possible = self._possible()
        left_alone = {t for t in lacking if t in possible or not chosen.takes(t)}
        strangers = {n for n in self.mapped.unknown if chosen.takes(n)}
        elsewhere = known - used - left
        cast = {
            target: f"{dtype_name(found)} -> {dtype_name(targets[target].dtype)}"
            for target, recipe in recipes.items()
            if (found := self._info(recipe.stored[0]).dtype) is not targets[target].dtype
        }
        unmapped = set(self.names.values()) - known
        return LoadReport(
            path=self.where,
            loaded=tuple(sorted(recipes)),
            skipped=tuple(sorted(left | left_alone | {n for n in unmapped if not chosen.takes(n)})),
            missing=tuple(sorted(lacking - left_alone)),
            unexpected=tuple(sorted(strangers)),
            elsewhere=tuple(sorted(elsewhere)),
            ignored=tuple(
                sorted(n for n in unmapped - set(self.mapped.unknown) if chosen.takes(n))
            ),
            tied=twins,
            cast=cast,
        )

    def _twins(self, recipes: Mapping[str, Recipe]) -> dict[str, str]:
        """Return the model's tensors that are one with a loaded one, and have no values besides."""
        loaded = {identity(self.targets[target]): target for target in recipes}
        return {
            name: first
            for name, tensor in self.targets.items()
            if name not in recipes and (first := loaded.get(identity(tensor))) is not None
        }

    def _check_fit(self, recipes: Mapping[str, Recipe]) -> None:
        """Compare shapes and kinds of dtype."""
        wrong = [
            f"{recipe.stored[0]} is {list(stored.shape)}, the model's is {list(tensor.shape)}"
            for target, recipe in recipes.items()
            if recipe.converter is None
            and (stored := self._info(recipe.stored[0])).shape
            != (tensor := self.targets[target]).shape
        ]
        wrong += [
            f"{name} is {dtype_name(found)}, the model's is {dtype_name(tensor.dtype)}"
            for target, recipe in recipes.items()
            for name in recipe.stored
            if (found := self._info(name).dtype).is_floating_point
            != (tensor := self.targets[target]).is_floating_point()
        ]
        if wrong:
            raise CheckpointError(f"{self.where}: {'; '.join(wrong[:20])}{_more(len(wrong) - 20)}")
        if self.skeleton is not None:
            stored = {n: self._info(n) for recipe in recipes.values() for n in recipe.stored}
            check_conversions(self.skeleton, recipes.values(), stored, self.source)

    def _check_twins(self, recipes: Mapping[str, Recipe]) -> None:
        """Refuse different values for what is one tensor in the model."""
        firsts: dict[Any, str] = {}
        for target, recipe in recipes.items():
            first = firsts.setdefault(identity(self.targets[target]), target)
            if first != target and recipe.stored != recipes[first].stored:
                ours, theirs = recipe.stored[0], recipes[first].stored[0]
                if not torch.equal(self._read(ours), self._read(theirs)):
                    raise CheckpointError(
                        f"{self.where} has different values for {theirs} and {ours}, which are one"
                        " tensor in the model (tied): leave one of them out (without=[…]), or untie"
                        " them (tie_word_embeddings=False)"
                    )

    def _values(self, recipes: Mapping[str, Recipe]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the model's tensors with their new values."""
        done: set[int] = set()
        for target, recipe in recipes.items():
            if recipe.converter is None:
                yield target, self._read(recipe.stored[0])
            elif id(recipe) not in done and self.skeleton is not None:
                done.add(id(recipe))
                tensors = map(self._read, recipe.stored)
                made = convert(self.skeleton, recipe, tensors, self.source)
                yield from ((name, value) for name, value in made.items() if name in recipes)

    def _info(self, name: str) -> Any:
        return self.source.info(self._own_names[name])

    def _read(self, name: str) -> torch.Tensor:
        return self.source.read(self._own_names[name])

    @property
    def _own_names(self) -> Mapping[str, str]:
        """The file's names by the plain ones."""
        return {plain: own for own, plain in self.names.items()}


def _plain_names(source: TensorSource, known: Container[str], where: str) -> dict[str, str]:
    """Return a file's names, and what they are without what wrappers put in."""
    names = plain_names(source.names(), known)
    if len(set(names.values())) < len(names):
        twice = [n for n, plain in names.items() if n != plain and plain in names]
        raise CheckpointError(f"{where} has tensors by two names that are one: {listed(twice)}")
    return names


def _skeleton(module: nn.Module) -> PreTrainedModel | None:
    """Return the whole of transformers' model on meta, of which `module` is one or a part."""
    if not isinstance(module, PreTrainedModel):
        return None
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    usual = known.get(type(module.config), None)
    if usual is None or usual.__name__ != architecture_of(module):
        return None
    return build_skeleton(copy.deepcopy(module.config))


def _targets(modules: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of some modules themselves, by their plain names; adapters are left out."""
    for module in modules:
        for name, tensor in stored_tensors(module):
            if _ADAPTER not in name:
                yield plain_name(name).replace(_BASE_LAYER, ""), tensor


@contextmanager
def _put_together(model: nn.Module) -> Iterator[None]:
    """Have a model whole that FSDP1 shards; each rank keeps its share of what is changed."""
    if not fsdp1_modules(model):
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - slow

    with FullyShardedDataParallel.summon_full_params(model, writeback=True):
        yield


def _disagreements(report: LoadReport) -> Iterator[str]:
    """Yield what is wrong with the names."""
    if report.missing:
        yield f"it lacks {listed(report.missing)}"
    if report.unexpected:
        yield f"the model has no place for {listed(report.unexpected)}"


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""


def _fill(targets: Mapping[str, torch.Tensor], values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put values into the model's own tensors."""
    with torch.no_grad():
        for name, value in values:
            target = targets[name]
            if isinstance(target, DTensor):
                shared = value.to(target.device_mesh.device_type, target.dtype)
                share = distribute_tensor(
                    shared, target.device_mesh, target.placements, src_data_rank=None
                )
                target.to_local().copy_(share.to_local())
            else:
                target.copy_(value)
