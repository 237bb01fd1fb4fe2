"""Classes by architecture and part: thin doors to the one builder."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from splitlearn_core.builder import build_part
from splitlearn_core.families import KNOWN_TYPES, family_of
from splitlearn_core.loading.materialize import Placement
from splitlearn_core.loading.sources import StateDictSource
from splitlearn_core.plan import BOTTOM, TOP, TRUNK, ComponentSpec
from splitlearn_core.split_model import SplitModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

PARTS = (BOTTOM, TRUNK, TOP)


class ArchitecturePart:
    """One kind of part of one architecture; made by `ModelRegistry.get_model_class`.

    Attributes:
        model_type: Architecture.
        part: `bottom`, `trunk` or `top`.
    """

    model_type: ClassVar[str]
    part: ClassVar[str]

    @classmethod
    def from_pretrained_split(
        cls,
        full_state_dict: Mapping[str, torch.Tensor],
        config: PreTrainedConfig,
        *,
        start_layer: int | None = None,
        end_layer: int | None = None,
    ) -> SplitModel:
        """Build this part out of a whole model's state dict; it shares the tensors' memory.

        Args:
            full_state_dict: The unsplit model's tensors, by its own names or the hub's.
            config: The unsplit model's config.
            start_layer: First layer; not for a Bottom, which begins at 0.
            end_layer: One past the last; not for a Top, which ends with the model.

        Raises:
            ValueError: A layer number is missing, out of range, or another architecture's config;
                or (`CheckpointError`) the state dict lacks a tensor.
        """
        if config.model_type != cls.model_type:
            raise ValueError(
                f"{cls.__name__} needs a {cls.model_type} config, found {config.model_type}"
            )
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        spec = _layer_span(cls.part, num_layers, start_layer, end_layer)
        source = StateDictSource(full_state_dict, "the given state dict")
        placement = Placement(torch.device("cpu"))
        return build_part(config, spec, source, placement, checkpoint="the given state dict")


def _layer_span(part: str, num_layers: int, start: int | None, end: int | None) -> ComponentSpec:
    """Return what a part owns, having checked the layer numbers that it was given."""
    first = 0 if part == BOTTOM and start is None else start
    last = num_layers if part == TOP and end is None else end
    if first is None or last is None:
        missing = "start_layer" if first is None else "end_layer"
        raise ValueError(f"a {part} needs {missing}")
    if not 0 <= first <= last <= num_layers:
        raise ValueError(f"layers [{first}, {last}) are out of range: the model has {num_layers}")
    if (part == BOTTOM and first != 0) or (part == TOP and last != num_layers):
        raise ValueError(f"a {part} can't have the layers [{first}, {last}) of {num_layers}")
    return ComponentSpec(part, first, last, part == BOTTOM, part == TOP)


@cache
def _make_class(model_type: str, part: str) -> type[ArchitecturePart]:
    """Return the class, the same one each time."""
    name = (
        f"{model_type.upper() if model_type == 'gpt2' else model_type.title()}{part.title()}Model"
    )
    return type(name, (ArchitecturePart,), {"model_type": model_type, "part": part})


class ModelRegistry:
    """The architectures that can be split."""

    @staticmethod
    def get_model_class(model_type: str, part: str) -> type[ArchitecturePart]:
        """Return the class of one part (`bottom`, `trunk`, `top`) of an architecture.

        Raises:
            UnsupportedModelError: (a `KeyError`) Unknown architecture; lists those that are known.
            KeyError: Unknown part.
        """
        family_of(model_type)
        if part not in PARTS:
            raise KeyError(f"unknown part {part!r}; there is {', '.join(PARTS)}")
        return _make_class(model_type, part)

    @staticmethod
    def list_supported_models() -> list[str]:
        """Return the architectures."""
        return list(KNOWN_TYPES)

    @staticmethod
    def is_model_registered(model_type: str) -> bool:
        """Whether an architecture can be split."""
        return model_type in KNOWN_TYPES

    @staticmethod
    def is_complete(model_type: str) -> bool:
        """Whether an architecture has all three parts: every one that is known has."""
        return ModelRegistry.is_model_registered(model_type)

    @staticmethod
    def get_model_info(model_type: str) -> dict[str, Any]:
        """Return the names of an architecture's part classes, and where its layers lie."""
        family = family_of(model_type)
        classes = {part: _make_class(model_type, part).__name__ for part in PARTS}
        return {"model_type": model_type, "classes": classes, "layers": family.layers}
