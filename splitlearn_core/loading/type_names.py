"""Whose tensor is it, where only the type of a model is known, and not its config.

transformers' rules for a checkpoint's names belong to a model's class.  A small model of the type,
on the meta device, has them all; its layers are fewer than a checkpoint's, so that another layer's
number is tried where a name's own is not there.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import TYPE_CHECKING

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from splitlearn_core.loading.names import Rules
from splitlearn_core.skeleton import build_skeleton
from splitlearn_core.small_model import LAYERS, small_config

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class TypeNames:
    """A type's names."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a small model of the type, on meta."""
        self._rules = Rules(model)
        self._ties: dict[str, str] = dict(model.all_tied_weights_keys)
        embedding = model.get_input_embeddings()
        paths = (path for path, module in model.named_modules() if module is embedding)
        self._embedding = f"{next(paths, '')}.weight"

    def find(self, name: str) -> str | None:
        """Return the name that a stored tensor has in the module; `None`: it has no place there."""
        number = _NUMBER.search(name)
        for layer in (number[0], *map(str, range(LAYERS))) if number else ("",):
            target, _ = self._rules.rename(_NUMBER.sub(layer, name, count=1))
            if target in self._rules.targets:
                return _NUMBER.sub(number[0], target, count=1) if number else target
        return None

    def lent(self, owned: Iterable[str], stored: Collection[str]) -> set[str]:
        """Return the tensors that `owned` ones share, where a checkpoint has them once.

        Which ones may is what the type's config says by default.  A head of which nothing is stored
        is the token embedding.

        Args:
            owned: Modules, by their paths.
            stored: All that the checkpoint has, by the module's names.
        """
        prefixes = tuple(f"{path}." for path in owned)
        found = {
            origin
            for target, origin in self._ties.items()
            if target.startswith(prefixes) and target not in stored
        }
        has_own = any(name.startswith(prefixes) for name in stored)
        return found if has_own or not prefixes else found | {self._embedding}


@cache
def names_of_type(model_type: str) -> TypeNames | None:
    """Return a type's names; `None` where no model of it can be made unasked."""
    for make_config in (small_config, _default_config):
        try:
            return TypeNames(build_skeleton(make_config(model_type)))
        except Exception:
            # each architecture has its own demands on a config, and raises what it likes
            logger.debug("no %s of %s", make_config.__name__, model_type, exc_info=True)
    return None


def _default_config(model_type: str) -> PreTrainedConfig:
    """Return the config that transformers has for a type of which nothing is said."""
    config: PreTrainedConfig = CONFIG_MAPPING[model_type]()
    return config
