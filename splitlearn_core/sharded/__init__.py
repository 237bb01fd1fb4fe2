"""Weights sharded over ranks, with torch's FSDP1 and FSDP2: loaded, trained and saved.

Every rank is a process that `torchrun` starts; no rank ever holds the whole.  The names below are
imported when first used, so that what needs no torch stays cheap to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.sharded.adapters import save_adapter
    from splitlearn_core.sharded.dcp import check_optimizer, load_dcp, save_dcp
    from splitlearn_core.sharded.full_state import load_full_state
    from splitlearn_core.sharded.gathering import full_tensors
    from splitlearn_core.sharded.group import joined_group
    from splitlearn_core.sharded.load import load_sharded
    from splitlearn_core.sharded.report import RankReport, ShardReport, report_of

__all__ = [
    "RankReport",
    "ShardReport",
    "check_optimizer",
    "full_tensors",
    "joined_group",
    "load_dcp",
    "load_full_state",
    "load_sharded",
    "report_of",
    "save_adapter",
    "save_dcp",
]

_HOMES = {
    "RankReport": "report",
    "ShardReport": "report",
    "check_optimizer": "dcp",
    "full_tensors": "gathering",
    "joined_group": "group",
    "load_dcp": "dcp",
    "load_full_state": "full_state",
    "load_sharded": "load",
    "report_of": "report",
    "save_adapter": "adapters",
    "save_dcp": "dcp",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
