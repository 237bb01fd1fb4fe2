"""Sessions that go on when their server does not: at a restarted one, or at the next address."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from time import sleep
from typing import TYPE_CHECKING

from splitlearn_manager.client.connection import Request
from splitlearn_manager.client.errors import RemoteError, RemoteSessionClosed, RemoteUnavailable
from splitlearn_manager.client.incident import Incident, is_final
from splitlearn_manager.client.replay import replay, replay_all, tolerance_of
from splitlearn_manager.config.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from splitlearn_manager.client.connection import RemoteSession
    from splitlearn_manager.client.lasting import LastingSession, Want
    from splitlearn_manager.client.replicas import Replica, Replicas
    from splitlearn_manager.config.retry import RetryPolicy

logger = logging.getLogger(__name__)

MOST_HEALS = 5
"""How often sessions are brought back for one step: what ends the server each time is the step."""

_NO_ROOM = frozenset({"too_many_sessions", "no_memory"})
"""Codes of refusals by which nothing is lost, where a session is only to begin."""

_AT_HOME = frozenset({"expired", "evicted", "model_unloaded", "unknown_session"})
"""Why sessions end whose server is well: it is asked first."""


@dataclass(frozen=True)
class Healed:
    """Sessions that went on.

    Attributes:
        model_id: The Trunk's id.
        origin: Address where they were.
        address: Where they are now.
        reason: Why they could not stay: the text of the error that nobody sees.
        sessions: How many.
        positions: Positions that were computed again, of all of them.
        seconds: How long it took.
    """

    model_id: str
    origin: str
    address: str
    reason: str
    sessions: int
    positions: int
    seconds: float


class Healer:
    """Asks things of sessions, and brings those that were lost to where they were.

    Args:
        replicas: Where sessions can be.
        model_id: The Trunk's id there.
        policy: How often, and how long, it is tried; `None`: not at all.
        observer: Called with a `Healed` when sessions went on, in the thread that used them.

    Attributes:
        healed: Sessions that went on, each time counted.
        replayed_positions: Positions that were computed again for it.
    """

    def __init__(
        self,
        replicas: Replicas,
        model_id: str,
        policy: RetryPolicy | None,
        observer: Callable[[Healed], object] | None = None,
    ) -> None:
        self.healed = 0
        self.replayed_positions = 0
        self._replicas = replicas
        self._model_id = model_id
        self._policy = policy
        self._observer = observer

    def ask(self, wants: Sequence[Want]) -> None:
        """Ask what is wanted, each of another session, all together.

        Sessions that are to begin are opened.  Those that are lost are brought back, and what was
        not answered is asked again of them: nothing of it is in what was replayed.

        Raises:
            RuntimeError: The Trunk was closed.
        """
        for want in wants:
            if want.lasting.session is None:
                self._open(want)
        self._exchange(wants)
        if self._policy is None:
            return
        incident = None
        for _ in range(MOST_HEALS):
            lost = [want for want in wants if _is_lost(want)]
            if not lost:
                return
            incident = incident or Incident(self._policy)
            self._heal(lost, incident)
            self._exchange(wants)

    @staticmethod
    def _opened(replica: Replica, lasting: LastingSession) -> RemoteSession:
        """Open a session as it is wanted."""
        return replica.open_session(rollback=lasting.rollback, traceparent=lasting.traceparent)

    def _open(self, want: Want) -> None:
        """Open a session that is to begin."""
        try:
            replica = self._replicas.current
            want.lasting.session = self._opened(replica, want.lasting)
        except (RemoteError, RemoteUnavailable) as error:
            want.error = error

    def _exchange(self, wants: Sequence[Want]) -> None:
        """Ask what can be asked and was not."""
        groups: dict[Replica, list[Request]] = {}
        for want in wants:
            session = want.lasting.session
            if session is not None and want.error is None and want.request is None:
                want.request = Request(want.frame, want.expected, session)
                groups.setdefault(self._replicas.of(session), []).append(want.request)
        for replica, requests in groups.items():
            replica.exchange(requests)

    # --- Going on --------------------------------------------------------------------------

    def _heal(self, wants: Sequence[Want], incident: Incident) -> None:
        """Bring lost sessions to where they were, or say why they can't be."""
        left = []
        for want in wants:
            if want.lasting.history.complete:
                left.append(want)
            else:
                want.error, want.given_up = _history_is_gone(want), True
        replicas = self._in_turn(left, incident)
        for rounds in itertools.count(1):
            for replica in incident.due(replicas):
                left = self._attempt(replica, left, incident)
                if not left:
                    return
            pause = incident.pause(rounds, replicas) if any(map(_is_patient, left)) else None
            if pause is None:
                break
            if rounds == 1:
                logger.warning("%s; trying to go on, %s", str(left[0].failure), incident.limits)
            sleep(pause)
        for want in left:
            want.error, want.given_up = _given_up(want, incident), True

    def _in_turn(self, wants: Sequence[Want], incident: Incident) -> tuple[Replica, ...]:
        """Return the addresses, in the order in which they are tried."""
        if not wants:
            return ()
        want = wants[0]
        session, failure = want.lasting.session, want.failure
        if session is None:
            current = self._replicas.current
            incident.note(current, [failure])
            others = self._replicas.in_turn(current, last=True)[:-1]
            return (*others, current) if any(map(_is_patient, wants)) else others
        answers = isinstance(failure.__cause__, RemoteError)  # it was asked to resume, and refused
        is_well = answers or session.ended in _AT_HOME
        return self._replicas.in_turn(self._replicas.of(session), last=not is_well)

    def _attempt(self, replica: Replica, wants: list[Want], incident: Incident) -> list[Want]:
        """Bring sessions to where they were, at one address; return those that could not be."""
        begin = time.monotonic()
        sessions, failed = self._move(replica, wants)
        moved = [want for want in wants if want not in failed]
        if moved:
            self._replicas.current = replica
            self._tell(moved, replica, time.monotonic() - begin)
        for want in moved:
            want.lasting.session, want.request, want.error = sessions[want], None, None
        for want in failed.keys() & sessions.keys():
            replica.close_session(sessions[want])
        if failed:
            incident.note(replica, failed.values())
            logger.info("%s", str(next(iter(failed.values()))))  # its frames hold sessions
        return list(failed)

    def _move(
        self, replica: Replica, wants: Sequence[Want]
    ) -> tuple[dict[Want, RemoteSession], dict[Want, Exception]]:
        """Open a session for each, and replay; return the sessions, and what failed."""
        sessions: dict[Want, RemoteSession] = {}
        failed: dict[Want, Exception] = {}
        try:
            self._replicas.check(replica)
        except (RemoteError, RemoteUnavailable) as error:
            return sessions, dict.fromkeys(wants, error)
        for want in wants:
            try:
                sessions[want] = self._opened(replica, want.lasting)
            except (RemoteError, RemoteUnavailable) as error:
                failed[want] = error
        tolerance = tolerance_of(self._replicas.description)
        work = {w: replay(s, w.lasting.history, tolerance) for w, s in sessions.items()}
        return sessions, failed | replay_all(replica, work)

    def _tell(self, wants: Sequence[Want], replica: Replica, seconds: float) -> None:
        """Count what went on, and say so."""
        lost = [want for want in wants if want.lasting.session is not None]
        failure = str(wants[0].failure)
        if not lost:
            logger.warning("%s; beginning at %s", failure, replica.address)
            return
        positions = sum(len(want.lasting.history) for want in lost)
        origin = lost[0].lasting.session
        told = Healed(
            self._model_id,
            str(replica.address if origin is None else origin.connection.address),
            str(replica.address),
            failure,
            len(lost),
            positions,
            seconds,
        )
        self.healed += told.sessions
        self.replayed_positions += positions
        logger.warning(
            "connection to %s lost; going on at %s (%d positions replayed in %.2f s): %s",
            told.origin,
            told.address,
            positions,
            seconds,
            failure,
        )
        if self._observer is not None:
            self._observer(told)


def _is_lost(want: Want) -> bool:
    """Whether a session was lost, or could not be opened, in a way that may be mended."""
    session = want.lasting.session
    if want.given_up or want.is_answered:
        return False
    if session is None:
        return want.error is not None
    return session.ended not in {None, "closed"} and not session.failed


def _is_patient(want: Want) -> bool:
    """Whether to wait for a server: not for room, where nothing is lost without it."""
    if want.lasting.session is not None:
        return True
    failure = want.failure
    no_room = isinstance(failure, RemoteUnavailable) and failure.code in _NO_ROOM
    return not (is_final(failure) or no_room)


def _history_is_gone(want: Want) -> Exception:
    """Return what to raise where there is nothing to replay."""
    session, limit = want.lasting.session, want.lasting.history.limit
    return RemoteSessionClosed(
        f"{want.failure}; it can't be gone on with elsewhere, because more was sent than the"
        f" {format_bytes(limit)} of its history that are kept (history_limit)",
        "closed" if session is None else str(session.ended),
    )


def _given_up(want: Want, incident: Incident) -> Exception:
    """Return what to raise where nothing helped: it says what was tried."""
    failure, session, tried = want.failure, want.lasting.session, incident.tried
    seconds = incident.seconds
    if session is None and sum(one.attempts for one in tried) == 1:
        return failure
    text = f"tried in {seconds:.1f} s: {'; '.join(map(str, tried))}"
    if session is None:
        return RemoteUnavailable(
            f"no session could be opened; {text}", tried=tried, seconds=seconds
        )
    error = RemoteSessionClosed(
        f"{failure}; it could not be gone on with elsewhere or again; {text}",
        str(session.ended),
        tried,
        seconds,
    )
    error.__cause__ = failure
    return error
