"""The life of a model in the manager, as a table.

Every change of a model's state goes through `transition`, which looks it up here: a move that the
table does not have raises and changes nothing.  Whatever else needs the states (documents, metrics,
tests) reads them from here too.

    absent ──> loading ──> ready ──> unloading ──> absent
                  └──────> failed ──> loading | absent

A load ends in exactly one of `ready` and `failed`; what was cancelled or refused is `failed` too,
with that as its reason.  An unload can't fail: `unloading` lasts until the last use has ended, or
was ended.  `ready` to `ready` is a reload: a newer load of the same model has taken its place.
`docs/states.md` is drawn from this table by `scripts/draw_states`.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from splitlearn_manager.errors import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Mapping


class ModelStatus(StrEnum):
    """What users see of a model's state, by name: in logs, over HTTP and in errors."""

    LOADING = "loading"
    """A load is in flight; see its `LoadPhase`."""
    READY = "ready"
    """It can be used."""
    UNLOADING = "unloading"
    """It takes no new use, and goes when those in flight have ended."""
    FAILED = "failed"
    """Loading it did not succeed.  The entry keeps the reason, and takes no memory."""


class LoadPhase(StrEnum):
    """What a load is at; a load may go back to an earlier phase, but never skips its end."""

    QUEUED = "queued"
    """No worker is free yet, or the time for another attempt has not come."""
    WAITING_FOR_MEMORY = "waiting_for_memory"
    """Its size is known, its memory is not yet promised: others are giving some back."""
    DOWNLOADING = "downloading"
    """Files come from a hub."""
    READING = "reading"
    """The files are read: first their headers, for the size, then the weights."""
    WARMING_UP = "warming_up"
    """The first forward runs."""


ABSENT: Final = None
"""The state of a model that the manager does not have."""

State = ModelStatus | None
"""A model's status, or `ABSENT`."""

TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        ABSENT: frozenset({ModelStatus.LOADING}),
        ModelStatus.LOADING: frozenset({ModelStatus.READY, ModelStatus.FAILED}),
        ModelStatus.READY: frozenset({ModelStatus.UNLOADING, ModelStatus.READY}),
        ModelStatus.UNLOADING: frozenset({ABSENT}),
        ModelStatus.FAILED: frozenset({ModelStatus.LOADING, ABSENT}),
    }
)
"""From each state, the states that may follow it."""


LOAD_ENDS = frozenset({ModelStatus.READY, ModelStatus.FAILED})
"""How a load ends."""


def state_name(state: State) -> str:
    """Return the name of a state, `absent` included."""
    return "absent" if state is ABSENT else state.value


def transition(old: State, new: State) -> State:
    """Return `new`, if it may follow `old`.

    Raises:
        IllegalTransitionError: It may not; names both, and what may.
    """
    if new not in TRANSITIONS[old]:
        allowed = " or ".join(sorted(map(state_name, TRANSITIONS[old])))
        raise IllegalTransitionError(
            f"a model can't go from {state_name(old)} to {state_name(new)}, only to {allowed}"
        )
    return new
