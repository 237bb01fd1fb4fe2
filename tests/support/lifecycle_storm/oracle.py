"""What must hold of a manager at every moment, and what it must answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from splitlearn_manager.core.entries import AsyncManagedModel
from splitlearn_manager.core.states import TRANSITIONS, ModelStatus
from splitlearn_manager.errors import (
    ManagerClosedError,
    ModelAlreadyLoadedError,
    ModelFailedError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelNotLoadingError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.events import TransitionEvent
    from splitlearn_manager.core.states import State
    from splitlearn_manager.serving.cache_memory import CacheMemory

LOADING, READY, UNLOADING, FAILED = (
    ModelStatus.LOADING,
    ModelStatus.READY,
    ModelStatus.UNLOADING,
    ModelStatus.FAILED,
)

# What may follow each state of one load; a reload's first move is from the older load's `ready`.
_LIFE: dict[State, set[State]] = {
    None: {LOADING, READY},
    LOADING: {READY, FAILED},
    READY: {UNLOADING},
    UNLOADING: {None},
    FAILED: {None},
}

Refusal = type[Exception] | None


class Oracle:
    """A small model of the manager, fed by its events alone.

    Attributes:
        wrong: What did not hold.
        seen: Every loaded model that ever was.
    """

    def __init__(self, manager: AsyncModelManager, longest: float, caches: CacheMemory) -> None:
        self.wrong: list[str] = []
        self.seen: set[AsyncManagedModel] = set()
        self._manager = manager
        self._longest = longest
        self._caches = caches
        self._visible: dict[str, tuple[int, ModelStatus]] = {}
        self._retiring: dict[int, ModelStatus] = {}
        self._lives: dict[int, State] = {}
        manager.on_transition.append(self.note)

    # --- What happens ----------------------------------------------------------------------

    def note(self, event: TransitionEvent) -> None:
        """Follow one move."""
        model_id, generation, new = event.model_id, event.generation, event.new
        if new not in TRANSITIONS[event.old]:
            self._say(f"{event} is no move of the table")
        before = self._lives.get(generation)
        if new not in _LIFE[before] or (before is None and generation in self._lives):
            self._say(f"generation {generation} of {model_id} went from {before} to {new}")
        self._lives[generation] = new
        if generation in self._retiring:
            self._follow_retiring(generation, new)
        else:
            self._follow_visible(event)

    def _follow_retiring(self, generation: int, new: State) -> None:
        if new is None:
            del self._retiring[generation]
        else:
            self._retiring[generation] = new

    def _follow_visible(self, event: TransitionEvent) -> None:
        model_id, new = event.model_id, event.new
        old = self._visible.get(model_id)
        if (old[1] if old else None) != event.old:
            self._say(f"{event} does not follow {old}")
        if old is not None and event.generation < old[0]:
            self._say(f"{event} is of an older load than {old}")
        if old is not None and old[1] is READY is new:
            self._retiring[old[0]] = READY
        if new is None:
            self._visible.pop(model_id, None)
        else:
            self._visible[model_id] = (event.generation, new)

    # --- What must be answered -------------------------------------------------------------

    def refusal(self, operation: str, model_id: str, config: ModelConfig | None) -> Refusal:
        """Return the error that an operation must end with if it begins now, if it must."""
        state = self._visible.get(model_id, (0, None))[1]
        if operation in {"unload", "cancel"}:
            return self._refusal_of_ending(operation, model_id, state)
        if self._manager._closing is not None:
            return ManagerClosedError
        if operation in {"use", "infer", "hang", "hold"}:
            return {
                None: ModelNotFoundError,
                LOADING: ModelLoadingError,
                UNLOADING: ModelUnloadingError,
                FAILED: ModelFailedError,
            }.get(state)
        if operation == "reload":
            return self._refusal_of_reload(model_id, state)
        if operation == "ensure" and self._is_as_wanted(model_id, config):
            return None
        return {
            LOADING: ModelLoadingError,
            READY: ModelAlreadyLoadedError,
            UNLOADING: ModelAlreadyLoadedError,
        }.get(state)

    def _refusal_of_ending(self, operation: str, model_id: str, state: State) -> Refusal:
        under_way = state is LOADING or model_id in self._manager._table.successors
        if state is None:
            return ModelNotFoundError
        if operation == "cancel":
            return None if under_way else ModelNotLoadingError
        return ModelLoadingError if under_way and state is not UNLOADING else None

    def _refusal_of_reload(self, model_id: str, state: State) -> Refusal:
        if state is READY and model_id in self._manager._table.successors:
            return ModelLoadingError
        return {
            None: ModelNotFoundError,
            LOADING: ModelLoadingError,
            UNLOADING: ModelUnloadingError,
        }.get(state)

    def _is_as_wanted(self, model_id: str, config: ModelConfig | None) -> bool:
        entry = self._manager.models.get(model_id)
        under_way = self._manager._table.load_under_way(model_id)
        is_ready = entry is not None and entry.status is READY and entry.config == config
        return is_ready or (under_way is not None and under_way.config == config)

    # --- What must hold --------------------------------------------------------------------

    def check(self) -> list[str]:
        """Return what did not hold since the last call, or does not now."""
        self._check_table()
        self._check_ledger()
        self._check_ages()
        wrong, self.wrong = self.wrong, []
        return wrong

    def _check_table(self) -> None:
        table = self._manager._table
        there = {m: (e.generation, e.status) for m, e in table.models.items()}
        if there != self._visible:
            self._say(f"the table has {there}, its events made {self._visible}")
        retiring = {m.generation: m.status for m in table.retiring}
        if retiring != self._retiring:
            self._say(f"retiring are {retiring}, the events made {self._retiring}")
        for model_id in table.successors:
            if model_id not in table.models:
                self._say(f"a reload of {model_id} has nothing to replace")
        self.seen |= {e for e in table.everything() if isinstance(e, AsyncManagedModel)}

    def _check_ledger(self) -> None:
        """Reserved bytes are those of the entries and of what is going, within the limit."""
        resources = self._manager.resource_manager
        with resources._mutex:
            held = list(resources._held)
            total = sum(r.nbytes for r in held)
            entries = list(self._manager._table.everything())
            known = {
                e.reservation for e in entries if e.reservation is not None and e.reservation.nbytes
            }
            known |= set(self._caches._held.values())
            going = {r for r in held if r.leaving or r.lingering}
        if total > resources.capacity():
            self._say(f"{total} bytes are reserved of {resources.capacity()}")
        if strangers := set(held) - known - going:
            self._say(f"nobody has {[(r.model_id, r.nbytes) for r in strangers]}")
        if missing := known - set(held):
            self._say(f"not in the ledger: {[(r.model_id, r.nbytes) for r in missing]}")
        accounted = sum(r.nbytes for r in known | going)
        if accounted != total:
            self._say(f"{total} bytes are reserved, the entries have {accounted}")
        for managed in (e for e in entries if isinstance(e, AsyncManagedModel)):
            self._check_caches(managed)

    def _check_caches(self, managed: AsyncManagedModel) -> None:
        """Sessions have what was reserved for them: of their model's, or beside it."""
        used, budget = managed.kv_cache_bytes, managed.kv_cache_budget
        beside = self._caches._held.get(managed)
        if budget is None and used != (0 if beside is None else beside.nbytes):
            self._say(f"sessions of {managed.model_id} have {used}, reserved is {beside}")
        if budget is None or managed.status is not READY:
            return
        if used > budget or beside is not None:
            self._say(f"sessions of {managed.model_id} have {used} of {budget}, and {beside}")
        reserved = managed.reservation.nbytes if managed.reservation is not None else 0
        if budget and reserved != managed.resident_bytes + budget:
            self._say(f"{managed.model_id} has {reserved}, of which {budget} are for its sessions")

    def _check_ages(self) -> None:
        """No entry stays where it is to leave by itself."""
        now = time.monotonic()
        for entry in self._manager._table.everything():
            age = now - entry.since
            if entry.status is LOADING and age > self._longest:
                self._say(f"{entry.model_id} loads for {age:.1f} s: {entry.info()}")
            drain = entry.drain if isinstance(entry, AsyncManagedModel) else None
            if drain is not None and drain.is_over and age > self._longest:
                self._say(f"{entry.model_id} is drained, and there for {age:.1f} s")

    def _say(self, what: str) -> None:
        self.wrong.append(what)
