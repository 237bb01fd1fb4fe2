"""The addresses that serve a Trunk: what each of them says of it, and their connections."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from splitlearn_manager.client.address import Address, model_path
from splitlearn_manager.client.connection import (
    CONNECT_TIMEOUT,
    RECONNECT_PAUSES,
    Attendant,
    RemoteSession,
    SessionConnection,
)
from splitlearn_manager.client.description import Description, describe
from splitlearn_manager.client.errors import RemoteError, RemoteUnavailable, Tried

if TYPE_CHECKING:
    from collections.abc import Sequence

    from splitlearn_manager.client.connection import Request


class Replica:
    """A Trunk at one address.

    Args:
        address: The daemon.
        model_id: The Trunk's id there.
        timeout: Seconds to wait for an answer.
        timings: Whether sessions are to say how long steps take there.
        pauses: Seconds between attempts to connect again, before a session is given up.
    """

    def __init__(
        self,
        address: Address,
        model_id: str,
        timeout: float,
        *,
        timings: bool,
        pauses: Sequence[float],
    ) -> None:
        self.address = address
        self.connection = SessionConnection(
            address, model_id, timeout, timings=timings, pauses=pauses
        )
        self._model_id = model_id
        self._lock = threading.Lock()
        self._attendant: Attendant | None = None
        self._closed = False

    def describe(self) -> Description:
        """Ask the server what the Trunk is.

        Raises:
            RemoteError: There is no such model (lists those there are), or it is no Trunk.
            RemoteUnavailable: The server can't be reached, or the model is not ready.
        """
        answer = self.address.get_json(model_path(self._model_id), CONNECT_TIMEOUT)
        return describe(answer, self._model_id, str(self.address))

    def open_session(self, *, rollback: bool, traceparent: str | None = None) -> RemoteSession:
        """Open a session, which is closed when nobody refers to it any more.

        Raises:
            RemoteError: The server refuses.
            RemoteUnavailable: It can't be reached, or has no room now.
            RuntimeError: The Trunk was closed.
        """
        self.refuse_if_closed()
        self._attended()
        try:
            session = self.connection.open_session(rollback=rollback, traceparent=traceparent)
        except RemoteUnavailable:
            self.refuse_if_closed()
            raise
        if self._closed:  # meanwhile, and perhaps before the session's connection was made
            self.connection.close()
        self.refuse_if_closed()
        self._look_after(session)
        return session

    def exchange(self, requests: Sequence[Request]) -> None:
        """Ask something of sessions here; see `SessionConnection.exchange`."""
        self.connection.exchange(requests)
        for request in requests:
            if request.opened is not None:
                self._look_after(request.opened)

    def close_session(self, session: RemoteSession) -> None:
        """Close a session, if it has not ended."""
        if session.ended is None:
            self.connection.close_session(session.id)
            session.ended = "closed"

    def close(self) -> None:
        """Close the connection, and with it every session."""
        with self._lock:
            self._closed = True
            attendant, self._attendant = self._attendant, None
        if attendant is not None:
            attendant.end()

    def refuse_if_closed(self) -> None:
        """Raise if the Trunk was closed."""
        if self._closed:
            raise RuntimeError(f"this RemoteTrunk ({self.address}) was closed")

    def _look_after(self, session: RemoteSession) -> None:
        """Let a session be closed when nobody refers to it any more."""
        attendant = self._attended()
        if attendant is not None:
            weakref.finalize(session, attendant.abandon, session.id).atexit = False

    def _attended(self) -> Attendant | None:
        """Return who looks after the connection; nobody, once it was closed."""
        with self._lock:
            if self._attendant is None and not self._closed:
                self._attendant = Attendant(self.connection)
                weakref.finalize(self, self._attendant.dismiss).atexit = False
            return self._attendant


class Replicas:
    """All addresses of a Trunk, of which one is in use.

    Args:
        addresses: In the order in which they are tried.
        model_id: The Trunk's id there.
        timeout: Seconds to wait for an answer.
        timings: Whether sessions are to say how long steps take there.
    """

    def __init__(
        self, addresses: Sequence[Address], model_id: str, timeout: float, *, timings: bool
    ) -> None:
        pauses = RECONNECT_PAUSES if len(addresses) == 1 else ()  # another one is found sooner
        self.all = tuple(
            Replica(address, model_id, timeout, timings=timings, pauses=pauses)
            for address in addresses
        )
        self.current = self.all[0]
        self._lock = threading.Lock()
        self._described: Description | None = None

    @property
    def description(self) -> Description:
        """What the first that answered said of the Trunk; it is asked once.

        Raises:
            RemoteError: The only address has no such model, or it is no Trunk there.
            RemoteUnavailable: None of them answers; says why, of each.
        """
        with self._lock:
            if self._described is None:
                self._described = self._ask_all()
            return self._described

    def _ask_all(self) -> Description:
        """Ask each address in turn, and use the first that answers."""
        if len(self.all) == 1:
            return self.current.describe()
        tried = []
        for replica in self.all:
            try:
                description = replica.describe()
            except (RemoteError, RemoteUnavailable) as error:
                tried.append(Tried(str(replica.address), 1, str(error)))
            else:
                self.current = replica
                return description
        raise RemoteUnavailable("; ".join(one.reason for one in tried), tried=tuple(tried))

    def of(self, session: RemoteSession) -> Replica:
        """Return where a session is."""
        return next(r for r in self.all if r.connection is session.connection)

    def in_turn(self, one: Replica, *, last: bool) -> tuple[Replica, ...]:
        """Return all of them in their order, beginning with one of them, or ending with it."""
        index = self.all.index(one) + last
        return self.all[index:] + self.all[:index]

    def check(self, replica: Replica) -> None:
        """Make sure that an address serves what was begun with.

        Raises:
            RemoteError: It does not; code `another_model` where it serves another part.
            RemoteUnavailable: It can't be reached, or not now.
            RuntimeError: The Trunk was closed.
        """
        replica.refuse_if_closed()
        known, found = self.description, replica.describe()
        if difference := known.difference(found):
            raise RemoteError(f"{replica.address} has another Trunk: {difference}", "another_model")

    def close(self) -> None:
        """Close all connections, and with them every session."""
        for replica in self.all:
            replica.close()
