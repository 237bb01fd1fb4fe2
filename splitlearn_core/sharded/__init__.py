"""Weights sharded over ranks, with torch's FSDP1 and FSDP2: loaded, trained and saved.

Every rank is a process that `torchrun` starts; no rank ever holds the whole.  The names below are
imported when first used, so that what needs no torch stays cheap to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.sharded.dcp import check_optimizer, load_dcp, save_dcp
    from splitlearn_core.sharded.group import joined_group

__all__ = [
    "check_optimizer",
    "joined_group",
    "load_dcp",
    "save_dcp",
]

_HOMES = {
    "check_optimizer": "dcp",
    "joined_group": "group",
    "load_dcp": "dcp",
    "save_dcp": "dcp",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
