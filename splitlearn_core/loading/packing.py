"""Packing linear layers while a part's weights come in, one after the other.

Packed are the `nn.Linear` (and Falcon's, which computes the same) and `Conv1D` (GPT-2's, a linear
with its weight the other way round) in the part's own layers, and the head, where it is one of
them: at the end of a small model it is the largest of all.  A head that is tied to the embedding
gets a packed weight besides, once the architecture has done to it what it does to the embedding,
which stays as it is.  So do fused experts, which are no linear layers, other subclasses, layers
that share their weight, and those whose weight the architecture's own code looks into.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitlearn_core.dtypes import dtype_name
from splitlearn_core.errors import QuantizationError
from splitlearn_core.linear_kernels import KERNELS, check_kernel, packed_nbytes
from splitlearn_core.packed_linear import PackedLinear
from splitlearn_core.quantization import dtype_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from splitlearn_core.families import Family
    from splitlearn_core.loading.materialize import PartReads, Placement
    from splitlearn_core.plan import ComponentSpec

_MATRIX = 2
_GENERAL = ("torch", "builtins", "transformers.")
_ARCHITECTURES = "transformers.models."
_ALIKE = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer that will be packed.

    Attributes:
        kind: The class that it was of.
        rows: Outputs.
        columns: Inputs.
        dtype: Of the weight before it is packed, and of activations.
        quantization: How it is packed.
        tensors: The part's names of what it needs: weight, and bias if there is one.
        waits: Whether it is packed after everything else.
    """

    kind: str
    rows: int
    columns: int
    dtype: torch.dtype
    quantization: str
    tensors: frozenset[str]
    waits: bool = False

    @property
    def is_transposed(self) -> bool:
        """Whether its weight is [in, out]."""
        return self.kind == Conv1D.__name__

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return packed_nbytes(self.quantization, self.rows, self.columns, self.dtype)

    @property
    def scratch(self) -> int:
        """Bytes that packing needs besides the weight and the packed weight."""
        turned = self.rows * self.columns * self.dtype.itemsize if self.is_transposed else 0
        return turned + KERNELS[self.quantization].scratch(self.rows, self.columns)


@dataclass(frozen=True)
class PackingPlan:
    """What of a part is packed.

    Attributes:
        quantization: How.
        layers: The layers, by their paths in the model.
        stored: The checkpoint's names of what becomes packed weights, and nothing else.
        left: Kind of module -> how many of them keep their matrices as they are, in the part's
            own layers and the head.
    """

    quantization: str
    layers: Mapping[str, PackedLayer]
    stored: frozenset[str]
    left: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = Counter(layer.kind for layer in self.layers.values())
        left = f"; as they were: {_counted(self.left)}" if self.left else ""
        return f"{self.quantization}: {_counted(kinds)} packed{left}"


def plan_packing(
    model: PreTrainedModel,
    family: Family,
    spec: ComponentSpec,
    reads: PartReads,
    placement: Placement,
) -> PackingPlan | None:
    """Choose what is packed; `None` where nothing is asked for.

    Args:
        model: Pruned, on meta.
        family: How the architecture is built.
        spec: What the part owns.
        reads: What the part needs from the checkpoint.
        placement: Has the quantization and the dtype.

    Raises:
        QuantizationError: (a `ValueError`) The weights' dtype does not go with it, or this machine
            can't do it.
    """
    if placement.quantization is None:
        return None
    layers: dict[str, PackedLayer] = {}
    left: Counter[str] = Counter()
    shared = _shared(reads)
    head = model.get_output_embeddings()
    for path, module in _candidates(model, family, spec):
        tied = f"{path}.weight" in shared
        why = _why_not(model, path, module, reads, tied=tied and module is not head)
        if why is None:
            layers[path] = replace(_layer(path, module, reads, placement), waits=tied)
        elif why:
            left[why] += 1
    for dtype in {layer.dtype for layer in layers.values()}:
        check_kernel(placement.quantization, dtype)
    return PackingPlan(placement.quantization, layers, _packed_alone(layers, reads), dict(left))


class Packer:
    """Packs each layer as soon as its tensors are there, but for those that wait for the rest.

    Args:
        plan: What is packed.
    """

    def __init__(self, plan: PackingPlan | None) -> None:
        layers = {} if plan is None else plan.layers
        self._layers = layers
        self._missing = {path: set(layer.tensors) for path, layer in layers.items()}

    def arrived(self, part: nn.Module, target: str) -> None:
        """Hear that a tensor of `part` has its value.

        Raises:
            QuantizationError: (a `ValueError`) It can't be packed; names it.
        """
        path = target.rpartition(".")[0]
        missing = self._missing.get(path)
        if missing is None:
            return
        missing.discard(target)
        if not missing and not self._layers[path].waits:
            del self._missing[path]
            _pack(part, path, self._layers[path])

    def finish(self, part: nn.Module) -> None:
        """Pack what has waited: everything else of `part` is as it will be.

        Raises:
            QuantizationError: As `arrived`.
        """
        while self._missing:
            path, _ = self._missing.popitem()
            _pack(part, path, self._layers[path])


@torch.no_grad()
def _pack(part: nn.Module, path: str, layer: PackedLayer) -> None:
    """Put a packed layer in the place of a plain one, whose weight is then let go."""
    plain: Any = part.get_submodule(path)
    weight = plain.weight.detach()
    weight = weight.t().contiguous() if layer.is_transposed else weight
    try:
        packed = PackedLinear(weight, plain.bias, layer.quantization)
    except QuantizationError as error:
        raise QuantizationError(f"{path}.weight {error}") from None
    parent, _, name = path.rpartition(".")
    setattr(part.get_submodule(parent), name, packed.eval())


def _candidates(
    model: PreTrainedModel, family: Family, spec: ComponentSpec
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the part's own layers, and the head, with their paths."""
    for number in range(spec.start_layer, spec.end_layer):
        root = f"{family.layers}.{number}"
        for path, module in model.get_submodule(root).named_modules():
            yield f"{root}.{path}".rstrip("."), module
    head: Any = model.get_output_embeddings() if spec.is_last else None
    if head is not None:
        yield from ((path, module) for path, module in model.named_modules() if module is head)


def _why_not(
    model: PreTrainedModel, path: str, module: nn.Module, reads: PartReads, *, tied: bool
) -> str | None:
    """Return `None` for what is packed, else its kind and why not; nothing if it has no matrix."""
    own = module.named_parameters(recurse=False)
    if not any(tensor.dim() >= _MATRIX for _, tensor in own):
        return ""
    kind = type(module).__name__
    if not _is_linear(type(module)) or f"{path}.weight" not in reads.recipes:
        return kind
    if tied:
        return f"{kind} (tied)"
    if _is_looked_into(model, path):
        return f"{kind} (its weight is used by itself)"
    return None


def _is_linear(kind: type) -> bool:
    """Whether modules of this very class do what `PackedLinear` does."""
    return kind in {nn.Linear, Conv1D} or (kind.__module__, kind.__name__) in _ALIKE


def _shared(reads: PartReads) -> set[str]:
    """Return the part's tensors whose values others of the model have, too."""
    several = (users for recipe, users in reads.distinct() if recipe.converter is None)
    twins = (name for users in several if len(users) > 1 for name in users)
    return {*reads.ties, *reads.ties.values(), *twins}


def _packed_alone(layers: Mapping[str, PackedLayer], reads: PartReads) -> frozenset[str]:
    """Return the stored tensors that nothing but packed weights is made of."""
    packed = {f"{path}.weight" for path in layers}
    recipes = (recipe for recipe, users in reads.distinct() if packed.issuperset(users))
    return frozenset(name for recipe in recipes for name in recipe.stored)


def _is_looked_into(model: PreTrainedModel, path: str) -> bool:
    """Whether the code around a layer takes its weight instead of calling it."""
    names = path.split(".")
    above: list[type] = [type(model.get_submodule(".".join(names[:n]))) for n in range(len(names))]
    return any(_mentions(kind, names[-1]) for kind in above)


@lru_cache(maxsize=4096)
def _mentions(kind: type, name: str) -> bool:
    """Whether a class's own code has the weight or bias of a child called `name`."""
    child = rf"\[{name}\]" if name.isdigit() else rf"\.{re.escape(name)}"
    pattern = re.compile(rf"{child}\.(weight|bias)\b")
    return any(pattern.search(_source(base)) for base in kind.__mro__)


@lru_cache(maxsize=1024)
def _source(kind: type) -> str:
    """Return the code of an architecture's class; none of what all of them share.

    What sets weights at the start may look into those of others (see `weights_shown`).
    """
    home = kind.__module__
    if home.startswith(_GENERAL) and not home.startswith(_ARCHITECTURES):
        return ""
    members = (getattr(member, "fget", member) for member in vars(kind).values())
    methods = [method for method in members if inspect.isfunction(method)]
    try:
        return "".join(inspect.getsource(m) for m in methods if m.__name__ != "_init_weights")
    except OSError:
        return ""


def _layer(path: str, module: Any, reads: PartReads, placement: Placement) -> PackedLayer:
    """Describe a layer that is packed."""
    quantization = placement.quantization or ""
    recipe = reads.recipes[f"{path}.weight"]
    (dtype, *others) = {reads.stored[name].final_dtype for name in recipe.stored}
    if others or (refusal := dtype_refusal(quantization, dtype_name(dtype))):
        raise QuantizationError(refusal if not others else f"{path}.weight has several dtypes")
    rows, columns = module.weight.shape
    if type(module) is Conv1D:
        rows, columns = columns, rows
    names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return PackedLayer(
        kind=type(module).__name__,
        rows=rows,
        columns=columns,
        dtype=dtype,
        quantization=quantization,
        tensors=frozenset(names),
    )


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing"
