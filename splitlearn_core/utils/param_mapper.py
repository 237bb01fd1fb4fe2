"""What a parameter's name says: its layer, or which end of the model it belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from splitlearn_core.families import family_of
from splitlearn_core.loading.type_names import names_of_type

if TYPE_CHECKING:
    import torch

    from splitlearn_core.families import Family

NO_LAYER = -1


class ParamMapper:
    """Reads parameter names of the known architectures: their modules' own, or a checkpoint's.

    The latter may lack the base model's prefix (`transformer.`, `model.`), as the hub's GPT-2 file
    does, or have others altogether, which are looked up as they are for loading.
    """

    @staticmethod
    def get_module_name(param_name: str, model_type: str) -> str:
        """Return the name that the model's module has for a checkpoint's tensor.

        A name that tells where it belongs as it is stays so, prefix or none.
        """
        family = family_of(model_type)
        ends = (*family.embeddings, *family.epilogue)
        if _layer_of(param_name, family) is not None or _belongs(param_name, ends):
            return param_name
        names = names_of_type(model_type)
        return (names and names.find(param_name)) or param_name

    @staticmethod
    def get_layer_number(param_name: str, model_type: str) -> int:
        """Return the decoder layer that a parameter belongs to, or -1 for none."""
        module_name = ParamMapper.get_module_name(param_name, model_type)
        match = _layer_of(module_name, family_of(model_type))
        return int(match.group(1)) if match else NO_LAYER

    @staticmethod
    def is_embedding(param_name: str, model_type: str) -> bool:
        """Whether a parameter belongs to the embeddings."""
        module_name = ParamMapper.get_module_name(param_name, model_type)
        return _belongs(module_name, family_of(model_type).embeddings)

    @staticmethod
    def is_lm_head(param_name: str, model_type: str) -> bool:
        """Whether a parameter belongs to the head."""
        module_name = ParamMapper.get_module_name(param_name, model_type)
        return _belongs(module_name, family_of(model_type).epilogue[-1:])

    @staticmethod
    def is_final_norm(param_name: str, model_type: str) -> bool:
        """Whether a parameter belongs to the norm after the last layer."""
        module_name = ParamMapper.get_module_name(param_name, model_type)
        return _belongs(module_name, family_of(model_type).epilogue[:-1])

    @staticmethod
    def is_everywhere(param_name: str, model_type: str) -> bool:
        """Whether every part has a parameter: it is in the model, but in none of its pieces."""
        family = family_of(model_type)
        pieces = (*family.embeddings, *family.epilogue, *family.unused)
        names = names_of_type(model_type)
        module_name = names.find(param_name) if names else None
        return module_name is not None and not (
            _layer_of(module_name, family) or _belongs(module_name, pieces)
        )

    @staticmethod
    def remap_layer_index(param_name: str, offset: int, model_type: str) -> str:
        """Return the name with its layer number moved by `-offset`.

        Raises:
            ValueError: The name has no layer number, or it would become negative.
        """
        number = ParamMapper.get_layer_number(param_name, model_type)
        if number == NO_LAYER or number < offset:
            raise ValueError(f"{param_name} has no layer number of at least {offset}")
        return re.sub(rf"(?<=\.){number}(?=\.)", str(number - offset), param_name, count=1)

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


def _layer_of(param_name: str, family: Family) -> re.Match[str] | None:
    """Return a match whose first group is the parameter's layer, where it has one."""
    return re.match(_optional_prefix(family.layers) + r"\.(\d+)\.", param_name)


def _optional_prefix(path: str) -> str:
    """Return a pattern for a module's path, with or without its first component."""
    first, _, rest = path.partition(".")
    return rf"(?:{re.escape(first)}\.)?{re.escape(rest)}" if rest else re.escape(first)


def _belongs(param_name: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter lies in one of `modules`."""
    return any(re.match(_optional_prefix(path) + r"\.", param_name) for path in modules)
