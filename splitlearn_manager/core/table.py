"""The manager's table: every model that there is, and the one place where a state changes.

Beside the entries that users see, by id, there are loads that are to replace a ready model
(`successors`), and models that were replaced and are still being drained (`retiring`).
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from typing import TYPE_CHECKING, TypeVar

from splitlearn_manager.core.entries import AsyncManagedModel, LoadingPlaceholder
from splitlearn_manager.core.event_bus import EventBus
from splitlearn_manager.core.events import TransitionEvent, log_failed_reload, log_transition
from splitlearn_manager.core.failures import log_with_frames
from splitlearn_manager.core.states import ABSENT, LOAD_ENDS, ModelStatus, transition
from splitlearn_manager.errors import ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.entries import Entry
    from splitlearn_manager.core.events import (
        FailedReloadObserver,
        ReloadFailedEvent,
        TransitionObserver,
    )
    from splitlearn_manager.core.model_info import ModelInfo
    from splitlearn_manager.core.states import State

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ModelTable:
    """The models of one manager.  Everything here runs on the event loop's thread, in one step.

    Attributes:
        models: The entries, by id.
        successors: Loads under way that will replace the ready model of the same id.
        retiring: Models that were replaced, until they are drained.
        on_transition: Called with every `TransitionEvent`, in order; the first one logs it.
        on_failed_reload: Likewise, with every `ReloadFailedEvent`.
        bus: Hands every event to whoever reads the stream.
    """

    def __init__(self) -> None:
        self.models: dict[str, Entry] = {}
        self.successors: dict[str, LoadingPlaceholder] = {}
        self.retiring: set[AsyncManagedModel] = set()
        self.on_transition: list[TransitionObserver] = [log_transition]
        self.on_failed_reload: list[FailedReloadObserver] = [log_failed_reload]
        self.bus = EventBus()
        self._generations = itertools.count(1)

    def entry(self, model_id: str) -> Entry:
        """Return the entry of a model.

        Raises:
            ModelNotFoundError: There is none.
        """
        try:
            return self.models[model_id]
        except KeyError:
            names = ", ".join(self.models) or "none"
            message = f"there is no model {model_id!r}; there are: {names}"
            raise ModelNotFoundError(message) from None

    def load_under_way(self, model_id: str) -> LoadingPlaceholder | None:
        """Return the load of a model, or its reload, if there is one under way."""
        entry = self.models.get(model_id)
        return entry if isinstance(entry, LoadingPlaceholder) else self.successors.get(model_id)

    def info(self, model_id: str) -> ModelInfo:
        """Return a snapshot of a model.

        Raises:
            ModelNotFoundError: There is none.
        """
        entry = self.entry(model_id)
        if isinstance(entry, AsyncManagedModel):
            return entry.info(self.successors.get(model_id))
        return entry.info()

    def everything(self) -> Iterator[Entry]:
        """Yield every entry: those that users see, their successors, and what is retiring."""
        yield from tuple(self.models.values())
        yield from tuple(self.successors.values())
        yield from tuple(self.retiring)

    def new_placeholder(self, config: ModelConfig) -> LoadingPlaceholder:
        """Return the entry of a load that is to begin, with a generation above all before it."""
        return LoadingPlaceholder(
            config.model_id,
            config,
            generation=next(self._generations),
            operation_id=new_operation_id(),
        )

    def move(
        self, entry: Entry, to: State, reason: str, *, code: str = "", unreturned: int = 0
    ) -> None:
        """Make one move; nothing else changes a state.

        Raises:
            IllegalTransitionError: The table of states has no such move; nothing was changed.
        """
        retiring = entry in self.retiring
        before = entry if retiring else self.models.get(entry.model_id)
        old, since = (before.status, before.since) if before is not None else (ABSENT, None)
        transition(old, to)
        now = time.monotonic()
        if to is not ABSENT:
            entry.status, entry.since = to, now
            if not retiring:
                self.models[entry.model_id] = entry
        elif retiring:
            self.retiring -= {entry}
        else:
            del self.models[entry.model_id]
        elapsed = 0.0 if since is None else now - since
        times = None if isinstance(entry, LoadingPlaceholder) else entry.load_times
        load_s, queued_s = times if times and to in LOAD_ENDS else (None, None)
        self._tell(
            TransitionEvent(
                entry.model_id,
                entry.generation,
                old,
                to,
                reason,
                elapsed,
                time.time(),
                entry.operation_id,
                code,
                unreturned,
                load_s,
                queued_s,
            )
        )

    def replace(self, managed: AsyncManagedModel, reason: str) -> AsyncManagedModel:
        """Put a newer load of a ready model in its place, and return the older, now retiring."""
        older = self.models[managed.model_id]
        if not isinstance(older, AsyncManagedModel):
            raise TypeError(f"only a loaded model is replaced, not one that is {older.status}")
        self.move(managed, ModelStatus.READY, reason)
        self.retiring.add(older)
        return older

    def reload_failed(self, event: ReloadFailedEvent) -> None:
        """Tell that a reload failed: the model stays as it was."""
        _tell_each(self.on_failed_reload, event)
        self.bus.publish(event)

    def _tell(self, event: TransitionEvent) -> None:
        _tell_each(self.on_transition, event)
        self.bus.publish(event)


def _tell_each(observers: Iterable[Callable[[T], None]], event: T) -> None:
    """Tell every observer; one that fails does not stop the others, or what it is told of."""
    for observer in tuple(observers):
        try:
            observer(event)
        except Exception:  # noqa: BLE001 - it is logged, as the docstring says
            log_with_frames(logger, "an observer of transitions failed")


def new_operation_id() -> str:
    """Return a name for one load, reload or unload, unique enough to find it in logs."""
    return secrets.token_hex(6)
