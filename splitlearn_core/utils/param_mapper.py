"""What a parameter's name says: its layer, or which end of the model it belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from splitlearn_core.families import family_of

if TYPE_CHECKING:
    import torch

NO_LAYER = -1


class ParamMapper:
    """Reads parameter names of the known architectures.

    Names may lack the base model's prefix (`transformer.`, `model.`), as the hub's GPT-2 file does.
    """

    @staticmethod
    def get_layer_number(param_name: str, model_type: str) -> int:
        """Return the decoder layer that a parameter belongs to, or -1 for none."""
        family = family_of(model_type)
        match = re.match(_optional_prefix(family.layers) + r"\.(\d+)\.", param_name)
        return int(match.group(1)) if match else NO_LAYER

    @staticmethod
    def is_embedding(param_name: str, model_type: str) -> bool:
        """Whether a parameter belongs to the embeddings."""
        return _belongs(param_name, family_of(model_type).embeddings)

    @staticmethod
    def is_lm_head(param_name: str, model_type: str) -> bool:
        """Whether a parameter belongs to the head."""
        return _belongs(param_name, family_of(model_type).epilogue[-1:])

    @staticmethod
    def is_final_norm(param_name: str, model_type: str) -> bool:
        """Whether a parameter belongs to the norm after the last layer."""
        return _belongs(param_name, family_of(model_type).epilogue[:-1])

    @staticmethod
    def remap_layer_index(param_name: str, offset: int, model_type: str) -> str:
        """Return the name with its layer number moved by `-offset`.

        Raises:
            ValueError: The name has no layer number, or it would become negative.
        """
        number = ParamMapper.get_layer_number(param_name, model_type)
        if number == NO_LAYER or number < offset:
            raise ValueError(f"{param_name} has no layer number of at least {offset}")
        layers = _optional_prefix(family_of(model_type).layers)
        return re.sub(
            rf"^({layers}\.){number}\.", lambda m: f"{m.group(1)}{number - offset}.", param_name
        )

    @staticmethod
    def filter_state_dict(
        state_dict: Mapping[str, torch.Tensor], keep: Callable[[str], bool]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors whose names `keep` admits."""
        return {name: tensor for name, tensor in state_dict.items() if keep(name)}

    @staticmethod
    def count_parameters(state_dict: Mapping[str, torch.Tensor]) -> int:
        """Return the number of elements in all tensors."""
        return sum(tensor.numel() for tensor in state_dict.values())

    @staticmethod
    def memory_footprint_mb(state_dict: Mapping[str, torch.Tensor]) -> float:
        """Return what the tensors take, in MB of 1,000,000 bytes, by their own dtypes."""
        return sum(tensor.nbytes for tensor in state_dict.values()) / 1e6

    @staticmethod
    def get_layer_statistics(names: Iterable[str], model_type: str) -> dict[int, int]:
        """Return how many parameters each layer has, by layer number (-1: outside of layers)."""
        counts: dict[int, int] = {}
        for name in names:
            number = ParamMapper.get_layer_number(name, model_type)
            counts[number] = counts.get(number, 0) + 1
        return dict(sorted(counts.items()))


def _optional_prefix(path: str) -> str:
    """Return a pattern for a module's path, with or without its first component."""
    first, _, rest = path.partition(".")
    return rf"(?:{re.escape(first)}\.)?{re.escape(rest)}" if rest else re.escape(first)


def _belongs(param_name: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter lies in one of `modules`."""
    return any(re.match(_optional_prefix(path) + r"\.", param_name) for path in modules)
