"""Architectures that nobody certified, for those who ask for them by a flag that says so.

A small random model of the type is made and watched, as it is when types are certified; but what
is found is then used without having been compared with the unsplit model.  `splitlearn verify
--allow-uncertified` does that for a checkpoint.
"""

from __future__ import annotations

import logging
import threading

import torch

from splitlearn_core.errors import UnsupportedModelError
from splitlearn_core.families import CERTIFIED, Family, architectures
from splitlearn_core.messages import in_one_line, short
from splitlearn_core.skeleton import building
from splitlearn_core.small_model import small_model
from splitlearn_core.tracing import NotAChainError, observe

logger = logging.getLogger(__name__)

_found: dict[str, Family] = {}
_looking = threading.Lock()


def any_family(model_type: str) -> Family:
    """Return how a `model_type` is built: as the table says, or else as its own forward shows.

    Raises:
        UnsupportedModelError: (a `KeyError`) transformers does not know the type, it is not a
            chain of layers, or no small model of it can be made and run; says which.
    """
    with _looking:
        if model_type not in _found:
            known = architectures().get(model_type)
            certified = known.family if known and known.status == CERTIFIED else None
            _found[model_type] = certified or _look_at(model_type)
        return _found[model_type]


def remember(model_type: str, family: Family) -> None:
    """Let `any_family` return this for a type, in this process."""
    with _looking:
        _found[model_type] = family


def _look_at(model_type: str) -> Family:
    """Watch a small model of the type."""
    logger.warning(
        "model type %r was not certified: its parts may differ from the unsplit model; compare"
        " them with splitlearn verify",
        model_type,
    )
    try:
        with building, torch.random.fork_rng(devices=[]):
            return observe(small_model(model_type))
    except NotAChainError as error:
        raise UnsupportedModelError(f"model type {model_type!r} can't be split: {error}") from error
    except Exception as error:
        # each architecture has its own demands on a config, and raises what it likes
        raise UnsupportedModelError(
            f"model type {short(model_type)} is not certified, and a small model of it, to find out"
            f" how it is built, can't be made or run: {in_one_line(error)}"
        ) from error
