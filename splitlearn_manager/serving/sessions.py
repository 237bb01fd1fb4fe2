"""The sessions of one daemon: who has a KV cache here, for which model, and until when.

Everything runs on the event loop's thread, except forwards, which run in their model's own.

- A session belongs to one connection and one *load* of a model: a model that was unloaded and
  loaded again is another one, and its sessions are over.
- One step at a time: `claim` marks a session busy until `release`.  A session that is closed while
  it is busy ends at its release, so that a step in flight is answered first.
- A session holds its load of the model: that is unloaded, or makes way for a newer one, when the
  session ends, and at the latest at the deadline of its drain, which ends the session.
- Whoever owns a session is told of its end, once, whatever the cause.
- A session that its client wants to resume outlives its connection, for a while.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from splitlearn_manager.errors import ManagerError
from splitlearn_manager.serving.batcher import LONGEST_TOGETHER, BatchLimits, Turn
from splitlearn_manager.serving.batchers import Batchers
from splitlearn_manager.serving.cache_memory import BLOCK, CacheMemory, bytes_for
from splitlearn_manager.serving.claims import Claims, Quotas
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
from splitlearn_manager.serving.session import (
    Answered,
    Session,
    SessionMetrics,
    SessionObserver,
    SessionOwner,
)
from splitlearn_manager.serving.step import Contract, State, Step, check_step
from splitlearn_manager.serving.usage import ModelUsage
from splitlearn_manager.serving.wire import CloseReason, Frame, Kind, encode

if TYPE_CHECKING:
    from types import TracebackType

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.serving.forward import Outcome

logger = logging.getLogger(__name__)

_SHORTEST_SLEEP = 0.01
"""Seconds; keeps an idle time of 0 from spinning while a step runs."""

_TOKEN_BYTES = 16

_MOST_ROWS = 4096
_MOST_POSITIONS = 2**32 - 1
"""What a frame can count to."""

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class SessionTable:
    """All sessions of a daemon, at most `max_sessions`.

        async with SessionTable(manager, max_sessions=64, idle_timeout=300) as table:
            session = await table.open(owner, "trunk")

    Leaving the context closes what is still open, and the one task that expires idle sessions.

    Args:
        manager: Whose models the sessions are of.
        max_sessions: Most sessions at once, over all connections and models.
        idle_timeout: Seconds without a step after which a session ends.
        resume_timeout: Seconds that a session waits for its client, whose connection was lost; 0
            ends it with its connection.
        metrics: Who counts.
        observers: Who hears of every session.
        on_turn: Called with the turn of each step, in the context of its caller.
        limits: How far sessions share forwards.
        quotas: How much clients may hold, each and all of them.
        clock: Monotonic seconds.
        sleep: Waits for so many of them.

    Attributes:
        claims: What they hold.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        *,
        max_sessions: int,
        idle_timeout: float,
        resume_timeout: float = 0.0,
        metrics: SessionMetrics,
        observers: Sequence[SessionObserver] = (),
        on_turn: Callable[[Turn], None] | None = None,
        limits: BatchLimits = BatchLimits(),  # noqa: B008 - it can't be changed
        quotas: Quotas = Quotas(),  # noqa: B008 - likewise
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.max_sessions = max_sessions
        self.idle_timeout = idle_timeout
        self.resume_timeout = resume_timeout
        self._manager = manager
        self._metrics = metrics
        self._observers = observers
        self._clock = clock
        self._sleep = sleep
        self._batchers = Batchers(limits, metrics, clock, on_turn)
        self.claims = Claims(quotas, CacheMemory(manager.resource_manager))
        self._sessions: dict[int, Session] = {}  # the one used longest ago comes first
        self._draining = False
        self._occupied = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._expiry: asyncio.Task[None] | None = None
        self._absences: set[asyncio.Task[None]] = set()
        self._measured: dict[int, tuple[float, int]] = {}
        metrics.follow_sessions(self.usage)

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
        if self._absences:
            await asyncio.wait(self._absences)
        await self._batchers.ended()

    def __len__(self) -> int:
        """Return how many sessions there are."""
        return len(self._sessions)

    def usage(self) -> dict[str, ModelUsage]:
        """Return what the sessions of each model take now; may be called in any thread.

        To measure a cache takes a look at each of its tensors, so those that had no step since the
        last time are not measured again.
        """
        found = {model: ModelUsage(waiting=n) for model, n in self._batchers.waiting().items()}
        measured = {}
        for session in self._all():
            usage, state = found.setdefault(session.model_id, ModelUsage()), session.state
            used, nbytes = self._measured.get(session.id, (-1.0, 0))
            if used != session.last_used:
                used, nbytes = session.last_used, _allocated(state.cache, nbytes)
            measured[session.id] = used, nbytes
            usage.sessions += 1
            usage.tokens += state.length * (state.batch or 0)
            usage.allocated_bytes += nbytes
            usage.reserved_bytes += state.reserved
        self._measured = measured
        return found

    def reserved_on(self, device: str) -> int:
        """Return the bytes that caches have reserved on a device; may be called in any thread."""
        return self.claims.reserved_on(device)

    # --- A session's life ------------------------------------------------------------------

    async def open(
        self,
        owner: SessionOwner,
        model_id: str,
        max_length: int | None = None,
        *,
        client: str = "",
        rows: int = 1,
        rollback: bool = False,
        resume: bool = False,
        timings: bool = False,
    ) -> Session:
        """Open a session for a connection.

        Args:
            owner: The connection; it alone can use the session, and hears of its end.
            model_id: A Trunk.
            max_length: Most positions that the client wants, whose memory is reserved now; `None`
                for all that the model has, whose memory is reserved as they come.
            client: Who asks for it, and has it on its account.
            rows: Sequences that memory is reserved for.
            rollback: Whether the last step must always be possible to take back.
            resume: Whether the session is to outlive its connection.
            timings: Whether each RESULT is to say how long its step waited, and its forward took
                (`splitlearn_manager.serving.wire`).

        Raises:
            SessionError: No more sessions, for this client or at all, no memory, too long, not a
                Trunk, can't roll back, or shutting down.
            ManagerError: The model is not there, or not ready.
        """
        async with self._manager.use(model_id) as managed:
            # No `await` from here on: the model can't go before the session is in the table.
            self._check_room(client)
            _check_rows(rows)
            contract = Contract.of(managed.model)
            length = _granted_length(max_length, contract.max_positions)
            state = State(contract, managed.model.new_cache(), length, rollback, timings)
            if rollback:
                _record_past(state)
            if max_length is not None:
                self._reserve(client, managed, state, rows, max_length)
            session = self._place(owner, client, managed, state)
            if resume and self.resume_timeout:
                session.token = secrets.token_hex(_TOKEN_BYTES)
        return session

    async def fork(self, session: Session) -> Session:
        """Open another session for the same connection, that holds what a claimed one holds.

        Raises:
            SessionError: No more sessions, or shutting down.
            ManagerError: The model can't wait for it any longer.
        """
        owner, client = session.owner, session.client
        self._check_room(client)
        state = replace(session.state, reserved=0, positions=0)
        async with session.managed.use() as managed:
            held = session.state
            self.claims.raise_to(client, managed, state, held.positions, held.reserved)
            try:
                state.cache = await self._copy(session)
                self._check_room(client)
                _check_still_there(session, owner)
            except BaseException:
                self.claims.lower(client, managed, state, 0, 0)
                raise
            fork = self._place(owner, client, managed, state)
            if session.token:
                fork.token = secrets.token_hex(_TOKEN_BYTES)
        return fork

    async def _copy(self, session: Session) -> Any:
        """Copy a session's cache, in the model's thread."""
        try:
            return await session.managed.run(session.state.cache.copy)
        except ManagerError:
            raise
        except Exception as error:
            logger.exception("session %#010x can't be copied", session.id)
            raise StepFailedError(f"session {session.id:#010x} can't be copied") from error

    async def resume(self, owner: SessionOwner, session_id: int, token: str) -> Session:
        """Give a session to another connection of its client, once its step in flight has ended.

        Raises:
            UnknownSessionError: There is none with that id and that token.
        """
        session = self._sessions.get(session_id)
        unknown = UnknownSessionError(f"there is no session {session_id:#010x} to be resumed")
        if session is None or not token or not token.isascii():  # nor is any token of ours
            raise unknown
        if not secrets.compare_digest(session.token.encode(), token.encode()):
            raise unknown
        session.owner = owner
        self._end_absence(session)
        if session.task is not None:
            await asyncio.wait([session.task])
        if self._sessions.get(session_id) is not session:
            raise unknown  # it ended with its step
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

    def note_received(self, owner: SessionOwner, session_id: int, nbytes: int) -> None:
        """Count the bytes of a frame for the session that it is of, if there is one."""
        session = self._sessions.get(session_id)
        if session is not None and session.owner is owner:
            session.received += nbytes

    async def step(self, session: Session, frame: Frame) -> bytes:
        """Run one step of a claimed session, and return the RESULT frame that answers it.

        Raises:
            SessionError: The step was refused, and the session is as it was; or (`StepFailedError`,
                `ModelUnavailableError`) it could not be run, and the session ends at its release.
        """
        if session.last is not None and session.last.is_for(frame):
            return session.last.reply
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
            new = session.state.length - before
            tokens = new * (session.state.batch or 0)
            phase = "decode" if before and new <= LONGEST_TOGETHER else "prefill"
            session.steps += 1
            session.tokens += tokens
            seconds = self._clock() - started
            self._metrics.session_step(session.model_id, code, seconds, tokens, phase)

    async def roll_back(self, session: Session, frame: Frame) -> bytes:
        """Let a claimed session forget the positions from the frame's on; return the answer.

        Raises:
            RollBackError: It can't; it is as it was.
            ManagerError: The model can't wait for it any longer.
        """
        state = session.state
        mask = await self._change(session, "roll_back", frame.position)
        state.length, state.mask, session.last = frame.position, mask, None
        return _done(frame, state.length)  # asked again, it does nothing

    async def reorder(self, session: Session, frame: Frame) -> bytes:
        """Let the rows of a claimed session be those that the frame names; return the answer.

        Raises:
            BadStepError: It names no row, or one that there is not; the session is as it was.
            NoMemoryError: They don't fit; likewise.
            ManagerError: The model can't wait for it any longer.
        """
        if session.last is not None and session.last.is_for(frame):
            return session.last.reply
        rows = _row_numbers(frame.info.get("rows"))
        state = session.state
        self._reserve_rows(session, len(rows))
        mask = await self._change(session, "reorder", rows)
        state.batch, state.mask = len(rows), mask
        reply = _done(frame, state.length)
        session.last = Answered.of(frame, reply) if session.token else None
        return reply

    async def _change(self, session: Session, change: str, argument: Any) -> Any:
        """Change a claimed session's cache, in the model's thread."""
        try:
            async with session.managed.use() as managed:
                return await managed.run(_change_cache, change, session.state, argument)
        except SessionError:
            raise
        except ManagerError as error:
            raise self._gone(session) from error
        except Exception as error:
            session.ending = session.ending or CloseReason.INTERNAL  # nobody knows how far it is
            logger.exception("session %#010x of %s failed", session.id, session.model_id)
            raise StepFailedError(f"session {session.id:#010x} failed at it, and ends") from error
        except BaseException:
            session.ending = session.ending or CloseReason.INTERNAL
            raise

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

    def close_owned(self, owner: SessionOwner, *, lost: bool = False) -> None:
        """End every session of a connection that is gone.

        Args:
            owner: The connection.
            lost: Whether its client may come back: sessions that are to be resumed wait for it.
        """
        for session in self._all():
            if session.owner is not owner:
                continue
            if lost and session.token and not self._draining:
                self._await_client(session)
            else:
                self.close(session, CloseReason.CLOSED)

    def _await_client(self, session: Session) -> None:
        """Let a session be without a connection, but not for long."""
        session.owner = _Nobody()
        name = f"absence-{session.id:#010x}"
        session.absence = asyncio.create_task(self._end_absent(session), name=name)
        self._absences.add(session.absence)
        session.absence.add_done_callback(self._absences.discard)

    async def _end_absent(self, session: Session) -> None:
        """End a session whose client has not come back in time."""
        await self._sleep(self.resume_timeout)
        session.absence = None
        self.close(session, CloseReason.EXPIRED)

    @staticmethod
    def _end_absence(session: Session) -> None:
        """Wait for a client no longer."""
        if session.absence is not None:
            session.absence.cancel()
            session.absence = None

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
            await self._sleep(max(self._until_idle(), _SHORTEST_SLEEP))
            self.close_idle()

    def _until_idle(self) -> float:
        """Return the seconds until a session can expire.

        By itself, so that whoever sleeps keeps no session, nor its load of a model.
        """
        oldest = next(iter(self._sessions.values()))
        return oldest.last_used + self.idle_timeout - self._clock()

    def _model_goes(self, session: Session, error: ManagerError) -> None:
        """End a session whose model can't wait for it any longer."""
        del error  # the client is told the reason, not the text
        self.close(session, CloseReason.MODEL_UNLOADED)

    # --- One step --------------------------------------------------------------------------

    async def _run(self, session: Session, frame: Frame) -> bytes:
        """Check a step, run it in the model's thread, and take its outcome into the session."""
        step = check_step(session.state, frame)
        state = session.state
        end, before = state.length + step.new, (state.positions, state.reserved)
        self._reserve(session.client, session.managed, state, step.batch, end)
        try:
            async with session.managed.use():
                outcome = await self._forward(session, step)
        except SessionError:
            self.claims.lower(session.client, session.managed, state, *before)
            raise
        except ManagerError as error:
            raise self._gone(session) from error
        state.length += step.new
        state.batch = step.batch
        state.mask = outcome.mask
        if session.token:
            session.last = Answered.of(frame, outcome.reply)
        self._count_grown(session, step.new)
        return outcome.reply

    def _count_grown(self, session: Session, new: int) -> None:
        """Reserve what a cache was seen to take, where that was not known before.

        Where it does not fit, the session ends: its memory is taken already.
        """
        state = session.state
        crossed = state.length // BLOCK != (state.length - new) // BLOCK
        if state.contract.kv_bytes is not None or not (crossed or not state.reserved):
            return
        taken = int(getattr(state.cache, "allocated_nbytes", 0))
        try:
            self.claims.raise_to(session.client, session.managed, state, state.positions, taken)
        except SessionError:
            session.ending = session.ending or CloseReason.EVICTED

    async def _forward(self, session: Session, step: Step) -> Outcome:
        """Run a step when its turn comes; what the model raises is for the log alone."""
        try:
            return await session.batcher.run(session.state, step)
        except StepFailedError:
            session.ending = session.ending or CloseReason.INTERNAL
            raise
        except ManagerError:
            raise
        except Exception as error:
            logger.exception("session %#010x of %s failed", session.id, session.model_id)
            session.ending = session.ending or CloseReason.INTERNAL
            raise StepFailedError(
                f"the step failed on the server, and session {session.id:#010x} with it"
            ) from error

    def _reserve(
        self, client: str, managed: AsyncManagedModel, state: State, rows: int, positions: int
    ) -> None:
        """Claim what a cache will take, beyond what it has.

        Raises:
            ClientLimitError: Its client would hold more than it may.
            NoMemoryError: It does not fit.
        """
        nbytes = bytes_for(state.contract.kv_bytes, rows, positions)
        self.claims.raise_to(client, managed, state, rows * positions, nbytes)

    def _reserve_rows(self, session: Session, rows: int) -> None:
        """Claim what a cache of so many rows will take.

        Raises:
            ClientLimitError: Its client would hold more than it may.
            NoMemoryError: It does not fit.
        """
        state = session.state
        if state.contract.kv_bytes is not None:
            self._reserve(session.client, session.managed, state, rows, state.length)
            return
        taken = int(getattr(state.cache, "allocated_nbytes", 0)) // (state.batch or 1) * rows
        positions = rows * state.length
        self.claims.raise_to(session.client, session.managed, state, positions, taken)

    def _gone(self, session: Session) -> ModelUnavailableError:
        """Let a session end for want of its model."""
        session.ending = session.ending or CloseReason.MODEL_UNLOADED
        return ModelUnavailableError(f"model {session.model_id!r} was unloaded or replaced")

    # --- The table -------------------------------------------------------------------------

    def _check_room(self, client: str) -> None:
        """Raise if a client may open no session now."""
        if self._draining:
            raise DrainingError("the server is shutting down")
        if len(self._sessions) >= self.max_sessions:
            raise TooManySessionsError(
                f"the server holds {len(self._sessions)} sessions, as many as it may"
            )
        self.claims.check_session(client)

    def _new_id(self) -> int:
        """Return an id that no session has."""
        while True:
            session_id = secrets.randbelow(2**32)
            if session_id and session_id not in self._sessions:
                return session_id

    def _place(
        self, owner: SessionOwner, client: str, managed: AsyncManagedModel, state: State
    ) -> Session:
        """Make a session, and put it into the table."""
        try:
            batcher = self._batchers.take(managed)
            session_id, now = self._new_id(), self._clock()
            session = Session(session_id, owner, managed, batcher, state, client, now)
            try:
                session.hold = managed.hold(partial(self._model_goes, session))
            except BaseException:
                self._batchers.give_back(managed, state)
                raise
        except BaseException:
            self.claims.lower(client, managed, state, 0, 0)
            raise
        self._add(session)
        return session

    def _add(self, session: Session) -> None:
        """Put a session into the table."""
        self._sessions[session.id] = session
        self.claims.add_session(session.client)
        self._occupied.set()
        self._empty.clear()
        self._metrics.session_opened(session.model_id)
        for observer in self._observers:
            observer.session_opened(session)
        logger.debug("session %#010x of %s opened", session.id, session.model_id)

    def _remove(self, session: Session, reason: CloseReason) -> None:
        """Take a session out of the table, drop its cache, and tell its owner."""
        del self._sessions[session.id]
        session.state.cache = session.state.mask = session.last = None
        self._end_absence(session)
        self.claims.end_session(session.client, session.managed, session.state)
        self._batchers.give_back(session.managed, session.state)
        if session.hold is not None:
            session.hold.release()
        if not self._sessions:
            self._occupied.clear()
            self._empty.set()
        self._metrics.session_ended(session.model_id, reason)
        for observer in self._observers:
            observer.session_ended(session, reason)
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


def _check_still_there(session: Session, owner: SessionOwner) -> None:
    """Refuse to open something for a connection that is gone."""
    if session.ending is not None or session.owner is not owner:
        raise UnknownSessionError("whoever asked for it is gone")


class _Nobody:
    """Owns the sessions that wait for their clients."""

    def session_closed(self, session: Session, reason: CloseReason) -> None:
        """Tell nobody."""


def _allocated(cache: Any, before: int) -> int:
    """Return the bytes of a cache, or what they were, while a forward adds layers to it."""
    try:
        return int(getattr(cache, "allocated_nbytes", 0))
    except RuntimeError:  # something changed its size while it was gone through
        return before


def _record_past(state: State) -> None:
    """Let a cache keep what taking a step back needs."""
    from splitlearn_manager.serving import cache_changes  # noqa: PLC0415 - imports torch

    cache_changes.record_past(state.cache)


def _change_cache(change: str, state: State, argument: Any) -> Any:
    """Change a cache; in the model's thread."""
    from splitlearn_manager.serving import cache_changes  # noqa: PLC0415 - imports torch

    return getattr(cache_changes, change)(state, argument)


def _done(frame: Frame, length: int) -> bytes:
    """Return the answer to a change."""
    return encode(Frame(Kind.DONE, frame.request, frame.session, length))


def _check_rows(rows: Any) -> None:
    """Refuse a number of sequences that is none.

    Raises:
        BadOpenError: It is no whole number, or not in what a session may have.
    """
    if not _counts(rows, _MOST_ROWS):
        raise BadOpenError(f"rows must be a number of sequences, 1 to {_MOST_ROWS}, found {rows!r}")


def _row_numbers(rows: Any) -> list[int]:
    """Return what REORDER names.

    Raises:
        BadStepError: It is no list of row numbers, or an empty one.
    """
    if not isinstance(rows, list) or not rows or len(rows) > _MOST_ROWS:
        raise BadStepError(f"REORDER has rows, a list of 1 to {_MOST_ROWS} row numbers")
    for row in rows:
        if not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise BadStepError(f"rows are numbers from 0 on, found {row!r}")
    return rows


def _granted_length(wanted: Any, limit: int | None) -> int | None:
    """Return how many positions a session gets.

    Raises:
        BadOpenError: What is wanted is no number of positions.
        TooLongError: The model has fewer; says both numbers.
    """
    if wanted is None:
        return limit
    if not _counts(wanted, _MOST_POSITIONS):
        raise BadOpenError(
            f"max_length must be a number of positions, 1 to {_MOST_POSITIONS}, found {wanted!r}"
        )
    if limit is not None and wanted > limit:
        raise TooLongError(f"max_length is {wanted}, the model has {limit} positions")
    return int(wanted)


def _counts(value: Any, most: int) -> bool:
    """Whether a value is a whole number, 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
