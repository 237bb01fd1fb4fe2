"""What differs between architectures, as data: no code, no torch.

`certified.json` has an entry for every type of causal language model that transformers has: how it
is built, as its own forward showed, and whether its parts were found to equal the unsplit model to
the bit, in each of the dtypes that it names.  `scripts/certify` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from splitlearn_core.errors import UnsupportedModelError
from splitlearn_core.families.family import Family
from splitlearn_core.messages import short

__all__ = [
    "CERTIFIED",
    "KNOWN_TYPES",
    "Architecture",
    "Family",
    "architectures",
    "certified_dtypes",
    "family_of",
]

CERTIFIED = "certified"
FLAG = "allow_uncertified=True, or --allow-uncertified,"


@dataclass(frozen=True)
class Architecture:
    """What is known of one `model_type`.

    Attributes:
        model_type: As in `config.json`.
        status: `certified`, or `refused`.
        reason: Why it is refused; empty where it is not.
        family: How it is built; `None` where that could not be found out.
    """

    model_type: str
    status: str
    reason: str
    family: Family | None


@cache
def _table() -> dict[str, Any]:
    """Read `certified.json`."""
    text = files(__package__).joinpath("certified.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def certified_dtypes() -> tuple[str, ...]:
    """Return the dtypes in which every certified type was compared with the unsplit model."""
    return tuple(_table()["dtypes"])


@cache
def architectures() -> Mapping[str, Architecture]:
    """Return every known type, as the suite last certified it."""
    entries: dict[str, Any] = _table()["architectures"]
    return MappingProxyType(
        {
            name: Architecture(
                model_type=name,
                status=entry["status"],
                reason=entry.get("reason", ""),
                family=Family.from_dict(entry["family"]) if "family" in entry else None,
            )
            for name, entry in entries.items()
        }
    )


KNOWN_TYPES: tuple[str, ...] = tuple(
    sorted(name for name, known in architectures().items() if known.status == CERTIFIED)
)
"""The architectures that can be split."""


def family_of(model_type: str) -> Family:
    """Return how a `model_type` (as in `config.json`) is built.

    Raises:
        UnsupportedModelError: (a `KeyError`) The type is not known, or was not certified; says
            why, and lists those that are.
    """
    known = architectures().get(model_type)
    if known is None:
        raise UnsupportedModelError(
            f"unknown model type {short(model_type)}; known are {', '.join(KNOWN_TYPES)}"
            f" ({FLAG} tries another that transformers has)"
        )
    if known.status != CERTIFIED or known.family is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} can't be split: {known.reason} ({FLAG} tries it as it is)"
        )
    return known.family
