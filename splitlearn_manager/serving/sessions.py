"""The sessions of one daemon: who has a KV cache here, for which model, and until when.

Everything runs on the event loop's thread, except forwards, which run in their model's own.

- A session belongs to one connection and one *load* of a model: a model that was unloaded and
  loaded again is another one, and its sessions are over.
- One step at a time: `claim` marks a session busy until `release`.  A session that is closed while
  it is busy ends at its release, so that a step in flight is answered first.
- A session holds its load of the model: that is unloaded, or makes way for a newer one, when the
  session ends, and at the latest at the deadline of its drain, which ends the session.
- Whoever owns a session is told of its end, once, whatever the cause.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

from splitlearn_manager.errors import ManagerError
from splitlearn_manager.serving.batcher import Batcher, Batchers, BatchLimits, ForwardMetrics
from splitlearn_manager.serving.errors import (
    BadOpenError,
    BadStepError,
    DrainingError,
    ModelUnavailableError,
    SessionError,
    StepFailedError,
    TooLongError,
    TooManySessionsError,
    UnknownSessionError,
)
from splitlearn_manager.serving.step import Contract, State, Step, check_step
from splitlearn_manager.serving.wire import CloseReason, Frame

if TYPE_CHECKING:
    from types import TracebackType

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.lease import Hold
    from splitlearn_manager.serving.forward import Outcome

logger = logging.getLogger(__name__)

_SHORTEST_SLEEP = 0.01
"""Seconds; keeps an idle time of 0 from spinning while a step runs."""

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class SessionOwner(Protocol):
    """What the table asks of a connection."""

    def session_closed(self, session: Session, reason: CloseReason) -> None:
        """Hear that one of its sessions has ended; must not block."""
        ...


class SessionMetrics(ForwardMetrics, Protocol):
    """What the table reports."""

    def sessions_open(self, model_id: str, change: int) -> None:
        """Count a session that was opened (1) or has ended (-1)."""
        ...

    def session_step(self, model_id: str, code: str, seconds: float, tokens: int) -> None:
        """Count a step: its outcome (`ok` or an error's code), how long it took, its positions."""
        ...


@dataclass(eq=False, slots=True)
class Session:
    """One client's place in one model.

    Attributes:
        id: Random, so that nobody meets another's by counting; never 0.
        owner: The connection that opened it.
        managed: The model, as it was loaded then.
        batcher: Whoever runs its steps, with those of others.
        state: Its cache, and what was taken in so far.
        last_used: When a step last began or ended, by the table's clock.
        hold: What keeps the model for it.
        task: The task that runs and answers its one step, while there is one.
        busy: Whether a step was claimed and not yet released.
        ending: Why it is to end at its release.
    """

    id: int
    owner: SessionOwner
    managed: AsyncManagedModel
    batcher: Batcher
    state: State
    last_used: float
    hold: Hold | None = None
    task: asyncio.Task[None] | None = None
    busy: bool = False
    ending: CloseReason | None = None

    @property
    def model_id(self) -> str:
        """Id of its model."""
        return self.managed.model_id


class SessionTable:
    """All sessions of a daemon, at most `max_sessions`.

        async with SessionTable(manager, max_sessions=64, idle_timeout=300) as table:
            session = await table.open(owner, "trunk")

    Leaving the context closes what is still open, and the one task that expires idle sessions.

    Args:
        manager: Whose models the sessions are of.
        max_sessions: Most sessions at once, over all connections and models.
        idle_timeout: Seconds without a step after which a session ends.
        metrics: Who counts.
        limits: How far sessions share forwards.
        clock: Monotonic seconds.
        sleep: Waits for so many of them.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        *,
        max_sessions: int,
        idle_timeout: float,
        metrics: SessionMetrics,
        limits: BatchLimits = BatchLimits(),  # noqa: B008 - it can't be changed
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.max_sessions = max_sessions
        self.idle_timeout = idle_timeout
        self._manager = manager
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self._batchers = Batchers(limits, metrics, clock)
        self._sessions: dict[int, Session] = {}  # the one used longest ago comes first
        self._draining = False
        self._occupied = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._expiry: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to expire idle sessions."""
        self._expiry = asyncio.create_task(self._expire(), name="session-expiry")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what is left, without waiting for steps in flight to be answered."""
        await self.drain(0)
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.wait([self._expiry])
        await self._batchers.ended()

    def __len__(self) -> int:
        """Return how many sessions there are."""
        return len(self._sessions)

    # --- A session's life ------------------------------------------------------------------

    async def open(
        self, owner: SessionOwner, model_id: str, max_length: int | None = None
    ) -> Session:
        """Open a session for a connection.

        Args:
            owner: The connection; it alone can use the session, and hears of its end.
            model_id: A Trunk.
            max_length: Most positions that the client wants; `None` for all that the model has.

        Raises:
            SessionError: No more sessions, too long, not a Trunk, or shutting down.
            ManagerError: The model is not there, or not ready.
        """
        async with self._manager.use(model_id) as managed:
            # No `await` from here on: the model can't go before the session is in the table.
            self._check_room()
            contract = Contract.of(managed.model)
            length = _granted_length(max_length, contract.max_positions)
            state = State(contract, managed.model.new_cache(), length)
            batcher = self._batchers.take(managed)
            session = Session(self._new_id(), owner, managed, batcher, state, self._clock())
            session.hold = managed.hold(partial(self._model_goes, session))
            self._add(session)
        return session

    def find(self, owner: SessionOwner, session_id: int) -> Session:
        """Return a connection's own session.

        Raises:
            UnknownSessionError: It has none with that id.  Another connection's is not told apart
                from one that does not exist.
        """
        session = self._sessions.get(session_id)
        if session is None or session.owner is not owner:
            raise UnknownSessionError(f"this connection has no session {session_id:#010x}")
        return session

    def claim(self, owner: SessionOwner, session_id: int) -> Session:
        """Take a connection's session for one step; it is busy until `release`.

        Raises:
            UnknownSessionError: The connection has no such session.
            BadStepError: Its last step is not yet answered.
        """
        session = self.find(owner, session_id)
        if session.busy:
            raise BadStepError(
                f"session {session_id:#010x} has a step in flight; wait for its answer"
            )
        session.busy = True
        self._touch(session)
        return session

    async def step(self, session: Session, frame: Frame) -> bytes:
        """Run one step of a claimed session, and return the RESULT frame that answers it.

        Raises:
            SessionError: The step was refused, and the session is as it was; or (`StepFailedError`,
                `ModelUnavailableError`) it could not be run, and the session ends at its release.
        """
        started, code = self._clock(), "ok"
        before = session.state.length
        try:
            return await self._run(session, frame)
        except SessionError as error:
            code = error.code
            raise
        except BaseException:
            code = "cancelled"
            session.ending = session.ending or CloseReason.INTERNAL
            raise
        finally:
            tokens = (session.state.length - before) * (session.state.batch or 0)
            self._metrics.session_step(session.model_id, code, self._clock() - started, tokens)

    def release(self, session: Session) -> None:
        """End a claim, and the session with it if that was asked for meanwhile."""
        session.busy = False
        session.task = None
        if session.ending is not None:
            self._remove(session, session.ending)
        else:
            self._touch(session)

    def close(self, session: Session, reason: CloseReason) -> None:
        """End a session: now, or at its release if it is busy.  The first reason stands."""
        if session.busy:
            session.ending = session.ending or reason
        elif session.id in self._sessions:
            self._remove(session, reason)

    def close_owned(self, owner: SessionOwner) -> None:
        """End every session of a connection that is gone."""
        for session in self._all():
            if session.owner is owner:
                self.close(session, CloseReason.CLOSED)

    # --- The end of many -------------------------------------------------------------------

    def close_idle(self) -> None:
        """End the sessions that had no step for the idle time."""
        now = self._clock()
        for session in self._all():
            if now < session.last_used + self.idle_timeout:
                return
            if session.busy:
                self._touch(session)
            else:
                self.close(session, CloseReason.EXPIRED)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - it ends waiting, not the work
        """Refuse new sessions and end all: idle ones now, busy ones when their step is answered.

        Steps that are not answered after `timeout` seconds are cancelled.

        Returns:
            Whether none had to be.
        """
        self._draining = True
        for session in self._all():
            self.close(session, CloseReason.DRAINING)
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            await self._cancel_steps()
            return False
        return True

    async def _cancel_steps(self) -> None:
        """Cancel the tasks that run steps, and wait until their sessions have ended."""
        logger.warning("%d steps were not answered in time, and are cancelled", len(self))
        for session in self._all():
            if session.task is not None:
                session.task.cancel("the server is shutting down")
        await self._empty.wait()

    async def _expire(self) -> None:
        """Sleep until the next session can expire; a step only ever moves that moment away."""
        while True:
            while not self._sessions:
                await self._occupied.wait()
            oldest = next(iter(self._sessions.values()))
            left = oldest.last_used + self.idle_timeout - self._clock()
            await self._sleep(max(left, _SHORTEST_SLEEP))
            self.close_idle()

    def _model_goes(self, session: Session, error: ManagerError) -> None:
        """End a session whose model can't wait for it any longer."""
        del error  # the client is told the reason, not the text
        self.close(session, CloseReason.MODEL_UNLOADED)

    # --- One step --------------------------------------------------------------------------

    async def _run(self, session: Session, frame: Frame) -> bytes:
        """Check a step, run it in the model's thread, and take its outcome into the session."""
        step = check_step(session.state, frame)
        try:
            async with session.managed.use():
                outcome = await self._forward(session, step)
        except SessionError:
            raise
        except ManagerError as error:
            raise self._gone(session) from error
        session.state.length += step.new
        session.state.batch = step.batch
        session.state.mask = outcome.mask
        return outcome.reply

    async def _forward(self, session: Session, step: Step) -> Outcome:
        """Run a step when its turn comes; what the model raises is for the log alone."""
        try:
            return await session.batcher.run(session.state, step)
        except ManagerError:
            raise
        except Exception as error:
            logger.exception("session %#010x of %s failed", session.id, session.model_id)
            session.ending = session.ending or CloseReason.INTERNAL
            raise StepFailedError(
                f"the step failed on the server, and session {session.id:#010x} with it"
            ) from error

    def _gone(self, session: Session) -> ModelUnavailableError:
        """Let a session end for want of its model."""
        session.ending = session.ending or CloseReason.MODEL_UNLOADED
        return ModelUnavailableError(f"model {session.model_id!r} was unloaded or replaced")

    # --- The table -------------------------------------------------------------------------

    def _check_room(self) -> None:
        """Raise if no session may be opened now."""
        if self._draining:
            raise DrainingError("the server is shutting down")
        if len(self._sessions) >= self.max_sessions:
            raise TooManySessionsError(
                f"the server holds {len(self._sessions)} sessions, as many as it may"
            )

    def _new_id(self) -> int:
        """Return an id that no session has."""
        while True:
            session_id = secrets.randbelow(2**32)
            if session_id and session_id not in self._sessions:
                return session_id

    def _add(self, session: Session) -> None:
        """Put a session into the table."""
        self._sessions[session.id] = session
        self._occupied.set()
        self._empty.clear()
        self._metrics.sessions_open(session.model_id, 1)
        logger.debug("session %#010x of %s opened", session.id, session.model_id)

    def _remove(self, session: Session, reason: CloseReason) -> None:
        """Take a session out of the table, drop its cache, and tell its owner."""
        del self._sessions[session.id]
        session.state.cache = session.state.mask = None
        self._batchers.give_back(session.managed)
        if session.hold is not None:
            session.hold.release()
        if not self._sessions:
            self._occupied.clear()
            self._empty.set()
        self._metrics.sessions_open(session.model_id, -1)
        logger.debug("session %#010x of %s: %s", session.id, session.model_id, reason)
        session.owner.session_closed(session, reason)

    def _touch(self, session: Session) -> None:
        """Move a session to the end of the table's order."""
        session.last_used = self._clock()
        del self._sessions[session.id]
        self._sessions[session.id] = session

    def _all(self) -> list[Session]:
        """Return the sessions as they are now, because ending one changes the table."""
        return list(self._sessions.values())


def _granted_length(wanted: Any, limit: int | None) -> int | None:
    """Return how many positions a session gets.

    Raises:
        BadOpenError: What is wanted is no number of positions.
        TooLongError: The model has fewer; says both numbers.
    """
    if wanted is None:
        return limit
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise BadOpenError(f"max_length must be a number of positions, 1 or more, found {wanted!r}")
    if limit is not None and wanted > limit:
        raise TooLongError(f"max_length is {wanted}, the model has {limit} positions")
    return wanted
