"""Where a model is cut: pure values, no torch.

Split points are layer numbers: `[8, 24]` of 28 layers makes a Bottom with the layers 0-7,
a Trunk with 8-23 and a Top with 24-27.  Each further point makes one more Trunk.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsIndex

FULL = "full"
BOTTOM = "bottom"
TRUNK = "trunk"
TOP = "top"


@dataclass(frozen=True)
class ComponentSpec:
    """One part of a model: the layers `[start_layer, end_layer)` and which ends it owns.

    Attributes:
        name: `bottom`, `trunk`, `trunk-0`, `trunk-1`, …, `top` or `full`.
        start_layer: First layer of the part.
        end_layer: One past its last layer.
        is_first: Owns the embeddings, and takes `input_ids`.
        is_last: Owns the final norm and the head, and gives logits.
    """

    name: str
    start_layer: int
    end_layer: int
    is_first: bool
    is_last: bool

    @property
    def kind(self) -> str:
        """`bottom`, `trunk`, `top` or `full`: the name without a Trunk's number."""
        return self.name.partition("-")[0]

    @property
    def num_layers(self) -> int:
        """Number of layers in the part."""
        return self.end_layer - self.start_layer


def layer_number(value: SupportsIndex) -> int:
    """Return a whole number of any kind (numpy's, torch's) as Python's own.

    Raises:
        ValueError: It is none: a float, a truth value, text.
    """
    found = getattr(value, "dtype", type(value))
    if not isinstance(value, SupportsIndex) or "bool" in str(found):
        raise ValueError(f"split points must be layer numbers (integers), found {value!r}")
    try:
        return operator.index(value)
    except TypeError as error:  # a tensor of floats, which has the method
        raise ValueError(
            f"split points must be layer numbers (integers), found {value!r}"
        ) from error


def check_split_points(split_points: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return the points as a tuple, having checked all that can be without the model.

    Raises:
        ValueError: They are no integers, fewer than two, negative, or not in rising order.
    """
    if not isinstance(split_points, Iterable) or getattr(split_points, "shape", None) == ():
        raise ValueError(f"split points must be a list, as in [8, 24]; found {split_points!r}")
    points = tuple(map(layer_number, split_points))
    if len(points) < 2:  # noqa: PLR2004 - a Bottom, a Trunk and a Top need two cuts
        raise ValueError(f"split points must be at least two, as in [8, 24]; found {list(points)}")
    if any(a >= b for a, b in pairwise(points)) or points[0] < 0:
        raise ValueError(
            f"split points must rise from cut to cut, as in [8, 24]; found {list(points)}"
        )
    return points


@dataclass(frozen=True)
class SplitPlan:
    """How a model of `num_layers` layers is cut into `components`, in the order of the layers."""

    num_layers: int
    components: tuple[ComponentSpec, ...]

    @classmethod
    def from_split_points(
        cls, num_layers: int, split_points: Iterable[SupportsIndex], *, allow_empty: bool = False
    ) -> SplitPlan:
        """Plan the parts between `split_points`.

        Args:
            num_layers: Number of decoder layers of the model.
            split_points: Layer numbers, `0 < a < b < … < num_layers`.
            allow_empty: Let the first point be 0 (Bottom is the embeddings alone) and the last
                `num_layers` (Top is the final norm and the head alone).

        Raises:
            ValueError: The points are out of order or out of range; says how many layers there are.
        """
        points = check_split_points(split_points)
        low, high = (0, num_layers) if allow_empty else (1, num_layers - 1)
        if points[0] < low or points[-1] > high:
            raise ValueError(
                f"split points {list(points)} are out of range: the model has {num_layers} layers,"
                f" so each must be from {low} to {high}"
                + ("" if allow_empty else " (allow_empty=True also admits the ends)")
            )
        return cls(num_layers, tuple(_components(num_layers, points)))

    @classmethod
    def whole(cls, num_layers: int) -> SplitPlan:
        """Return the plan that cuts nothing: one component, `full`."""
        return cls(num_layers, (ComponentSpec(FULL, 0, num_layers, True, True),))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components, from Bottom to Top."""
        return tuple(spec.name for spec in self.components)

    @property
    def trunks(self) -> tuple[ComponentSpec, ...]:
        """The middle components, in order."""
        return tuple(spec for spec in self.components if spec.kind == TRUNK)

    def component(self, name: str) -> ComponentSpec:
        """Return one component by name; `full` is always there.

        Raises:
            KeyError: No component of the plan is called so; lists those that are.
        """
        if name == FULL:
            return SplitPlan.whole(self.num_layers).components[0]
        for spec in self.components:
            if spec.name == name:
                return spec
        raise KeyError(f"no component {name!r} in this plan; it has {', '.join(self.names)}, full")


def _components(num_layers: int, points: tuple[int, ...]) -> Iterator[ComponentSpec]:
    """Yield Bottom, the Trunks between the points, and Top."""
    spans = list(pairwise(points))
    yield ComponentSpec(BOTTOM, 0, points[0], True, False)
    for number, (start, end) in enumerate(spans):
        name = TRUNK if len(spans) == 1 else f"{TRUNK}-{number}"
        yield ComponentSpec(name, start, end, False, False)
    yield ComponentSpec(TOP, points[-1], num_layers, False, True)
