"""One WebSocket to the sessions of one model, for threads rather than for asyncio.

Requests take turns: one lock is held from a request to its answer, or from several that go together
to the last of their answers.  What the server says on its own account (a session has ended) is read
on the way to an answer, and noted for whom it concerns.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from websockets.exceptions import InvalidHandshake, InvalidStatus

from splitlearn_manager.client.address import seconds_to_wait
from splitlearn_manager.client.errors import RemoteError, RemoteSessionClosed, RemoteUnavailable
from splitlearn_manager.client.websocket import WebSocket, WebSocketLost
from splitlearn_manager.serving.wire import SUBPROTOCOL, Frame, Kind, WireError, decode, encode
from splitlearn_manager.trace_context import TRACEPARENT, trace_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from splitlearn_manager.client.address import Address

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
RECONNECT_PAUSES = (0.1, 0.4)
"""Seconds between attempts to connect again."""

RESUMES = 3
"""How often a session is resumed for one request: whatever cuts its connection may do so again."""

_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
"""Seconds without a word until the other machine is asked, between questions, and how many."""

_NOT_NOW = frozenset(
    {"client_limit", "too_many_sessions", "no_memory", "model_unavailable", "draining"}
)
"""Codes of what the server can't do now, and may be able to do later."""

_OPENING = frozenset({Kind.OPEN, Kind.FORK})

_FAILURES = frozenset({"internal", "not_finite"})
"""Codes of what the server failed at."""

_ENDINGS = {
    "internal": "internal",
    "not_finite": "internal",
    "model_unavailable": "model_unloaded",
    "unknown_session": "unknown_session",
}
"""Codes with which a session has ended, and why; the server says so as well, after them."""

TEND_INTERVAL = 10.0
"""Seconds between two looks at an idle connection: servers wait 20 and more for a ping's answer."""


@dataclass(eq=False)
class RemoteSession:
    """A session on the server.

    Attributes:
        connection: Over which it is used.
        id: Its id there.
        max_frame_bytes: Longest frame that the server reads, or `None` if it does not say.
        token: What proves that it is ours, on another connection; empty if the server does not
            keep sessions whose connection was lost.
        lost: Whether its connection was lost, so that it must be resumed.
        ended: Why it has ended, once that is known.
        failed: Whether it has ended because the server failed at what it was asked: the same would
            fail again.
    """

    connection: SessionConnection = field(repr=False)
    id: int
    max_frame_bytes: int | None
    token: str = ""
    lost: bool = False
    ended: str | None = None
    failed: bool = False


@dataclass(eq=False)
class Request:
    """What is asked of the server, and what came of it.

    Attributes:
        frame: The question; its session and its number are filled in.
        expected: Kind of the answer.
        session: The session that it is of, if it is of one.
        message: The question as it travels, once it does.
        answer: The answer, or why there is none.
        opened: The session that the answer is about, where it opens one.
        seconds: From when it was sent, with those that were sent together, to its answer.
    """

    frame: Frame
    expected: Kind
    session: RemoteSession | None = None
    message: bytes = field(default=b"", repr=False)
    answer: Frame | Exception | None = None
    opened: RemoteSession | None = None
    seconds: float = 0.0

    def result(self) -> Frame:
        """Return the answer, or raise why there is none."""
        if isinstance(self.answer, Frame):
            return self.answer
        raise self.answer or RuntimeError("the request was never sent")

    def session_opened(self) -> RemoteSession:
        """Return the session that was opened, or raise why there is none."""
        self.result()
        if self.opened is None:
            raise RuntimeError("the request opens no session")
        return self.opened


class SessionConnection:
    """The connection; it is made when it is needed, and made again when it was lost.

    Args:
        address: The daemon.
        model_id: The model there.
        timeout: Seconds to wait for an answer.
        timings: Whether sessions are to say of each step how long it took there, and why.
        pauses: Seconds between attempts to connect again, before a session is given up.

    Attributes:
        bytes_sent: Bytes of frames that went out.
        bytes_received: Bytes of frames that came in.
    """

    def __init__(
        self,
        address: Address,
        model_id: str,
        timeout: float,
        *,
        timings: bool = False,
        pauses: Sequence[float] = RECONNECT_PAUSES,
    ) -> None:
        self.address = address
        self.model_id = model_id
        self.timeout = timeout
        self._timings = timings
        self._pauses = pauses
        self.bytes_sent = 0
        self.bytes_received = 0
        self._turn = threading.Lock()
        self._requests = itertools.count(1)
        self._live: set[int] = set()  # sessions of this socket that nobody has closed yet
        self._abandoned: deque[int] = deque()  # sessions that nobody refers to any more
        self._sessions: WeakValueDictionary[int, RemoteSession] = WeakValueDictionary()
        self._socket: WebSocket | None = None
        self._closed = False

    # --- Sessions --------------------------------------------------------------------------

    def open_session(
        self, *, rollback: bool = False, traceparent: str | None = None
    ) -> RemoteSession:
        """Open a session, which outlives this connection if the server lets it.

        Args:
            rollback: Whether its last step must always be possible to take back.
            traceparent: The span that it belongs to; `None` takes the one that this runs in.

        Raises:
            RemoteError: The server refuses.
            RemoteUnavailable: It can't be reached, does not answer, or has no room now.
        """
        with self._turn:
            self._connect()
            self._close_abandoned()  # the server may have no room beside them
            self._connect()
            wishes: dict[str, Any] = {"resume": True}
            wishes |= {"rollback": True} if rollback else {}
            wishes |= {"timings": True} if self._timings else {}
            if named := traceparent or trace_headers().get(TRACEPARENT):
                wishes[TRACEPARENT] = named
            try:
                return self._open(Frame(Kind.OPEN, info=wishes))
            except RemoteSessionClosed as error:
                raise RemoteUnavailable(str(error)) from error

    def _open(self, frame: Frame) -> RemoteSession:
        """Ask for a session; once more if the connection was lost, which may have been long ago.

        A session that was opened, and not heard of, ends there by itself.
        """
        try:
            return self._ask(frame, Kind.OPENED).session_opened()
        except RemoteSessionClosed as error:
            logger.info("%s; trying again", error)
        except RemoteError as error:
            if error.code != "bad_open" or "timings" not in frame.info:
                raise
            logger.warning("%s does not tell where time goes: %s", self.address, error)
            self._timings = False
            info = {name: wish for name, wish in frame.info.items() if name != "timings"}
            return self._open(replace(frame, info=info))
        self._reconnect()
        return self._ask(frame, Kind.OPENED).session_opened()

    def _take(self, opened: Frame) -> RemoteSession:
        """Return the session that an OPENED is about."""
        session = RemoteSession(
            self,
            opened.session,
            opened.info.get("max_frame_bytes"),
            str(opened.info.get("resume") or ""),
        )
        self._live.add(session.id)
        self._sessions[session.id] = session
        return session

    def exchange(self, requests: Sequence[Request]) -> None:
        """Send all requests, each of another session, and wait for their answers.

        Where the connection is lost meanwhile, the sessions are resumed and what was not answered
        is sent again: the server does it once.  (Of a FORK it may make two sessions; the one that
        nobody knows of ends there by itself.)  Each request fails alone, with

        - `RemoteError`: the server refused it, and the session is as it was; or (code `internal`)
          it failed at it, and the session has ended;
        - `RemoteSessionClosed`: the session has ended;
        - `RemoteUnavailable`: no answer came in time, and the session is given up;
        - `ValueError`: it is longer than the server reads.
        """
        with self._turn:
            self._exchange(requests)

    def _resume(self, session: RemoteSession) -> None:
        """Take a session to a new connection.

        Raises:
            RemoteSessionClosed: The server does not know it any more, or can't be reached.
        """
        frame = Frame(Kind.RESUME, session=session.id, info={"resume": session.token})
        try:
            self._reconnect()
            self._ask(frame, Kind.OPENED)
        except (RemoteError, ConnectionError) as error:
            _end(session, "connection_lost")
            text = f"the connection to {self.address} was lost, and the session with it: {error}"
            raise RemoteSessionClosed(text, "connection_lost") from error
        session.lost = False
        self._live.add(session.id)
        self._sessions[session.id] = session

    def _reconnect(self) -> None:
        """Make the connection again, with some patience: a server takes a moment to come back.

        Raises:
            RemoteUnavailable: It can't be made.
        """
        for pause in self._pauses:
            try:
                return self._connect()
            except RemoteUnavailable as error:
                logger.info("%s; trying again in %g s", error, pause)
                time.sleep(pause)
        return self._connect()

    def close_session(self, session_id: int) -> None:
        """Close a session, and wait until it is; where that fails, it is gone or will expire."""
        with self._turn:
            self._close(session_id)

    def abandon(self, session_id: int) -> None:
        """Let a session be closed, by whoever has the turn next; a finaliser may call this."""
        self._abandoned.append(session_id)

    def close_abandoned(self) -> None:
        """Close the sessions that nobody refers to any more."""
        with self._turn:
            self._close_abandoned()

    def _close_abandoned(self) -> None:
        while self._abandoned:
            self._close(self._abandoned.popleft())

    def _close(self, session_id: int) -> None:
        with suppress(RemoteError, ConnectionError):
            if session_id in self._live:
                self._live.discard(session_id)
                self._ask(Frame(Kind.CLOSE, session=session_id), Kind.CLOSED)

    def tend(self) -> None:
        """Answer the server's pings, if nobody is using the connection, and if there is one."""
        if self._turn.acquire(blocking=False):
            try:
                if self._socket is not None:
                    self._socket.tend()
            except WebSocketLost:
                self._disconnect("connection_lost")
            finally:
                self._turn.release()

    def close(self) -> None:
        """Close the connection for good, and with it all sessions."""
        with self._turn:
            self._closed = True
            if self._socket is not None:
                self._socket.close()
            self._disconnect("closed")

    # --- One request -----------------------------------------------------------------------

    def _ask(self, frame: Frame, expected: Kind) -> Request:
        """Send one request, which is answered; the caller has the turn."""
        request = Request(frame, expected)
        self._exchange([request])
        request.result()
        return request

    def _exchange(self, requests: Sequence[Request]) -> None:
        """Send requests and get their answers; the caller has the turn."""
        waiting = {}
        for request in requests:
            number = self._next_request()
            request.answer = self._prepare(request, number)
            if request.answer is None:
                waiting[number] = request
        for _ in range(RESUMES + 1):
            self._resume_all(waiting)
            if not waiting:
                return
            self._ask_all(waiting)
        for request in waiting.values():
            request.answer = self._lost_for_good(request.session)

    def _prepare(self, request: Request, number: int) -> Exception | None:
        """Encode a request; return what is wrong with it."""
        session = request.session
        if session is not None and session.ended is not None:
            return _closed(session)
        session_id = request.frame.session if session is None else session.id
        request.frame = replace(request.frame, session=session_id, request=number)
        request.message = encode(request.frame)
        return _too_long(request.message, session)

    def _resume_all(self, waiting: dict[int, Request]) -> None:
        """Take the sessions whose connection was lost to a new one."""
        for number, request in list(waiting.items()):
            if request.session is not None and request.session.lost:
                try:
                    self._resume(request.session)
                except RemoteSessionClosed as error:
                    request.answer = error
                    del waiting[number]

    def _ask_all(self, waiting: dict[int, Request]) -> None:
        """Send requests, and take them out of `waiting` as they are answered.

        Those that are left were not answered because the connection was lost, and may be asked
        again over another one, where their session can be resumed.
        """
        begin = time.monotonic()
        try:
            self._send(*(request.message for request in waiting.values()))
            self._take_answers(waiting, begin)
        except WebSocketLost as error:
            self._disconnect("connection_lost")
            text = f"the connection to {self.address} was lost: {error}"
            self._fail_all(waiting, partial(RemoteSessionClosed, text, "connection_lost"))
        except TimeoutError:
            for request in waiting.values():
                self._give_up(request.session, "interrupted")
            text = f"{self.address} did not answer within {self.timeout:g} s"
            self._fail_all(waiting, partial(RemoteUnavailable, text))
        except _NonsenseError as error:
            self._disconnect("connection_lost")
            for request in waiting.values():
                _end(request.session, "bad_answer")
            text = f"{self.address} answered with {error}"
            self._fail_all(waiting, partial(RemoteError, text, "bad_answer"))
        except (KeyboardInterrupt, SystemExit):
            self._disconnect("interrupted")  # nobody knows how much of a frame went through
            raise

    @staticmethod
    def _fail_all(waiting: dict[int, Request], error: Callable[[], Exception]) -> None:
        """Answer what can't be asked again with an error."""
        for number, request in list(waiting.items()):
            if request.session is None or not request.session.lost:
                request.answer = error()
                del waiting[number]

    def _lost_for_good(self, session: RemoteSession | None) -> RemoteSessionClosed:
        """Give up a session whose connection is lost again and again."""
        _end(session, "connection_lost")
        text = f"the connection to {self.address} was lost {RESUMES + 1} times in a row"
        return RemoteSessionClosed(text, "connection_lost")

    def _next_request(self) -> int:
        return next(self._requests) & 0xFFFFFFFF

    def _take_answers(self, waiting: dict[int, Request], begin: float) -> None:
        """Read until every request is answered; other frames are for others, or came too late."""
        last = begin
        while waiting:
            frame = self._receive(last + self.timeout - time.monotonic())
            if frame.kind is Kind.CLOSED:
                self._note_end(frame)
                self._end_waiting(waiting)
            request = waiting.get(frame.request)
            if request is not None:
                request.answer = self._answer(frame, request)
                last = time.monotonic()
                request.seconds = last - begin
                del waiting[frame.request]

    def _answer(self, frame: Frame, request: Request) -> Frame | Exception:
        """Return an answer, or what it tells that went wrong."""
        if frame.kind is Kind.ERROR:
            return self._refused(frame, request.session)
        if frame.kind is not request.expected:
            raise _NonsenseError(f"{frame.kind.name} instead of {request.expected.name}")
        if request.frame.kind in _OPENING:
            request.opened = self._take(frame)
        return frame

    @staticmethod
    def _end_waiting(waiting: dict[int, Request]) -> None:
        """Answer the requests of sessions that have ended."""
        for number, request in list(waiting.items()):
            if request.session is not None and request.session.ended is not None:
                request.answer = _closed(request.session)
                del waiting[number]

    def _send(self, *messages: bytes) -> None:
        self._connected().send(*messages)
        self.bytes_sent += sum(map(len, messages))

    def _receive(self, timeout: float) -> Frame:
        message = self._connected().receive(timeout)
        self.bytes_received += len(message)
        try:
            return decode(message)
        except WireError as error:
            raise _NonsenseError(str(error)) from error

    def _refused(self, frame: Frame, session: RemoteSession | None) -> Exception:
        """Return what to raise for an ERROR."""
        code, message = str(frame.info.get("code")), str(frame.info.get("message"))
        text = f"{self.address} refused: {message}"
        if code in _ENDINGS:
            _end(session, _ENDINGS[code])
        if session is not None and code in _FAILURES:
            session.failed = True
        if code in _NOT_NOW:
            return RemoteUnavailable(text, code, seconds_to_wait(frame.info.get("retry_after")))
        return RemoteError(text, code)

    def _note_end(self, frame: Frame) -> None:
        """Take down that a session has ended."""
        self._live.discard(frame.session)
        session = self._sessions.pop(frame.session, None)
        if session is not None:
            session.ended = str(frame.info.get("reason"))

    def _give_up(self, session: RemoteSession | None, reason: str) -> None:
        """Let a session end of which nobody knows any more how far it is."""
        if session is None:
            return
        _end(session, reason)
        self._live.discard(session.id)
        with suppress(WebSocketLost):  # the answer is dropped when it comes
            self._send(encode(Frame(Kind.CLOSE, session=session.id)))

    # --- The socket ------------------------------------------------------------------------

    def _connect(self) -> None:
        """Make the connection, unless there is one that works."""
        if self._socket is not None and self._socket.is_open:
            return
        self._disconnect("connection_lost")
        address = self.address
        if self._closed:
            raise RemoteUnavailable(f"the connection to {address} was closed here", "closed")
        try:
            self._socket = WebSocket(
                _connected_socket(address.host, address.port),
                address.sessions_url(self.model_id),
                subprotocol=SUBPROTOCOL,
                headers=address.headers,
                tls=address.tls,
                handshake_timeout=CONNECT_TIMEOUT,
                send_timeout=self.timeout,
            )
        except InvalidStatus as error:
            response = error.response
            wait = seconds_to_wait(response.headers.get("Retry-After"))
            raise address.refusal(response.status_code, response.body or b"", wait) from error
        except (OSError, InvalidHandshake, WebSocketLost) as error:
            raise address.unreachable(error) from error

    def _connected(self) -> WebSocket:
        """Return the socket; the connection can have been lost a request ago."""
        if self._socket is None:
            raise WebSocketLost("there is none")
        return self._socket

    def _disconnect(self, reason: str) -> None:
        """Drop the socket; every session on it has ended, or can be resumed."""
        for session in list(self._sessions.values()):
            session.lost = bool(session.token) and reason == "connection_lost"
            session.ended = None if session.lost else reason
        self._sessions.clear()
        self._live.clear()
        if self._socket is not None:
            self._socket.drop()
        self._socket = None


def _connected_socket(host: str, port: int) -> socket.socket:
    """Return a socket that notices in some 20 s when the other machine is gone without a word."""
    sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # not every system has each of them
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


class _NonsenseError(Exception):
    """The other side said what makes no sense; says what."""


class Attendant:
    """Looks after a connection while nobody uses it, from a thread of its own.

    It answers pings, and closes sessions that the garbage collector found.  The collector runs
    anywhere, also in the middle of a request, so a finaliser may do no more than put a number into
    a queue.
    """

    def __init__(self, connection: SessionConnection) -> None:
        self._connection = connection
        self._goes_on: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(
            target=_attend,
            args=(connection, self._goes_on),
            name="splitlearn-remote-attendant",
            daemon=True,
        )
        self._thread.start()

    def abandon(self, session_id: int) -> None:
        """Let a session be closed; a finaliser may call this."""
        self._connection.abandon(session_id)
        self._goes_on.put(True)

    def dismiss(self) -> None:
        """Let the connection be closed, and the thread end; a finaliser may call this."""
        self._goes_on.put(False)

    def end(self) -> None:
        """Close the connection, and wait for the thread to end."""
        self.dismiss()
        self._thread.join(CLOSE_TIMEOUT)


def _attend(connection: SessionConnection, goes_on: SimpleQueue[bool]) -> None:
    while True:
        try:
            if not goes_on.get(timeout=TEND_INTERVAL):
                break
        except Empty:
            connection.tend()
        else:
            connection.close_abandoned()
    connection.close()


def _end(session: RemoteSession | None, reason: str) -> None:
    """Let a session be over here, if there is one."""
    if session is not None:
        session.lost, session.ended = False, reason


def _closed(session: RemoteSession) -> RemoteSessionClosed:
    reason = session.ended or "closed"
    return RemoteSessionClosed(
        f"session {session.id:#010x} has ended ({reason}); begin again with a new cache", reason
    )


def _too_long(message: bytes, session: RemoteSession | None) -> ValueError | None:
    """Refuse here what the server would answer by closing the connection."""
    limit = None if session is None else session.max_frame_bytes
    if limit is None or len(message) <= limit:
        return None
    return ValueError(
        f"the step takes {len(message)} bytes, and the server reads {limit} at once; send fewer"
        " positions or rows"
    )
