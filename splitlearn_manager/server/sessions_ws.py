"""Sessions over WebSocket: `GET /v2/models/{model}/sessions`, subprotocol `splitlearn.v1`.

One binary message is one frame (`splitlearn_manager.serving.wire`).  A connection may hold several
sessions, and a session one step in flight; so what a client that does not read can make the server
keep is one answer for each of its sessions, and its frames are not read meanwhile.

Every frame gets one answer, which has its number.  A refused one is answered with ERROR, and the
connection goes on.  It ends where the rest of it could not be understood: a header of another
version, a text message, a frame that is too long.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect, WebSocketState

from splitlearn_manager.errors import ManagerError, ModelLoadingError
from splitlearn_manager.server.security import CLIENT
from splitlearn_manager.serving.errors import BadOpenError, SessionError, UnknownSessionError
from splitlearn_manager.serving.step import Contract
from splitlearn_manager.serving.wire import (
    SUBPROTOCOL,
    CloseReason,
    Frame,
    Kind,
    WireError,
    decode,
    encode,
)
from splitlearn_manager.trace_context import TRACEPARENT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.websockets import WebSocket

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.observability import Metrics
    from splitlearn_manager.serving.session import Session
    from splitlearn_manager.serving.sessions import SessionTable
    from splitlearn_manager.tracing import Tracing

logger = logging.getLogger(__name__)

PATH = "/v2/models/{model}/sessions"

PROTOCOL = "sessions"
"""What these bytes are called in the metrics."""

MAX_ERROR_TEXT = 1000

_Work = Callable[["Session", Frame], Awaitable[bytes]]

CLOSE_GOING_AWAY = 1001
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_UNSUPPORTED_DATA = 1003

_GOODBYES = (1000, 1001)
"""With which a client that is done closes its connection."""


class SessionEndpoint:
    """Accepts connections, and ends them all when the daemon drains.

    Args:
        manager: Whose models are served.
        table: Where the sessions are.
        metrics: Who counts the bytes.
        tracing: Who makes spans of what clients ask for, if anybody does.
        max_frame_bytes: Longest message that the server reads; clients are told.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        table: SessionTable,
        metrics: Metrics,
        *,
        max_frame_bytes: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._manager = manager
        self._table = table
        self._metrics = metrics
        self._max_frame_bytes = max_frame_bytes
        self._connections: set[_Connection] = set()
        self._draining = False
        self._vacant = asyncio.Event()
        self._vacant.set()

    def routes(self) -> list[BaseRoute]:
        """Return the routes: the WebSocket, and a word to who comes with plain HTTP."""
        return [WebSocketRoute(PATH, self.connect), Route(PATH, _upgrade_required)]

    def reserved_on(self, device: str) -> int:
        """Return the bytes that the caches of sessions have reserved on a device."""
        return self._table.reserved_on(device)

    async def connect(self, websocket: WebSocket) -> None:
        """Serve one connection to its end.

        Raises:
            ManagerError: (before the handshake is answered) The model is not there, not ready, or
                no Trunk.
            HTTPException: (likewise) The client does not speak this protocol, or comes too late.
        """
        model_id = websocket.path_params["model"]
        await self._check(model_id, websocket.scope["subprotocols"])
        await websocket.accept(subprotocol=SUBPROTOCOL)
        client = getattr(websocket.state, CLIENT, "")
        connection = _Connection(
            websocket,
            self._table,
            self._metrics,
            model_id,
            client,
            self._max_frame_bytes,
            self._tracing,
        )
        self._connections.add(connection)
        self._vacant.clear()
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            if not self._connections:
                self._vacant.set()

    async def _check(self, model_id: str, subprotocols: Iterable[str]) -> None:
        """Refuse, while it can still be said in HTTP, who would get no session here."""
        if self._draining:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down")
        if SUBPROTOCOL not in subprotocols:
            raise HTTPException(
                HTTPStatus.BAD_REQUEST, f"offer the WebSocket subprotocol {SUBPROTOCOL}"
            )
        managed = await self._manager.get_model(model_id)
        if managed is None:
            raise ModelLoadingError(f"model {model_id!r} is being loaded")
        Contract.of(managed.model)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - it ends waiting, not the work
        """End all sessions, telling their clients, and then all connections.

        Steps in flight are answered first; after `timeout` seconds they are cancelled, and
        connections that did not hear of their end are left to the server that has their sockets.

        Returns:
            Whether every step was answered.
        """
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout
        clean = await self._table.drain(timeout)
        for connection in tuple(self._connections):
            connection.end(CLOSE_GOING_AWAY, "draining")
        try:
            async with asyncio.timeout_at(deadline):
                await self._vacant.wait()
        except TimeoutError:
            logger.warning("%d connections did not close in time", len(self._connections))
        return clean


class _Connection:
    """One client's connection: reads its frames in order, and owns the tasks that answer steps."""

    def __init__(
        self,
        websocket: WebSocket,
        table: SessionTable,
        metrics: Metrics,
        model_id: str,
        client: str,
        max_frame_bytes: int,
        tracing: Tracing | None,
    ) -> None:
        self._tracing = tracing
        self._websocket = websocket
        self._table = table
        self._metrics = metrics
        self._model_id = model_id
        self._client = client
        self._max_frame_bytes = max_frame_bytes
        self._tasks = asyncio.TaskGroup()
        self._closes: dict[int, int] = {}  # session -> the CLOSE request to be answered
        self._notices: deque[bytes] = deque()  # CLOSED frames that wait to be sent
        self._gone = False
        self._lost = True  # until the client says goodbye

    async def run(self) -> None:
        """Read frames until the client is gone; then let what is in flight end, and free all."""
        async with self._tasks:
            try:
                while (message := await self._receive()) is not None:
                    await self._handle(message)
            finally:
                self._gone = True
                self._table.close_owned(self, lost=self._lost)

    def end(self, code: int, reason: str) -> None:
        """Close the connection, after whatever is being sent; must not block."""
        if not self._gone:
            self._tasks.create_task(self._close(code, reason))

    def session_closed(self, session: Session, reason: CloseReason) -> None:
        """Tell the client that a session of its own has ended, before anything else is said."""
        request = self._closes.pop(session.id, 0)
        if not self._gone:
            frame = Frame(Kind.CLOSED, request, session.id, info={"reason": reason})
            self._notices.append(encode(frame))
            self._tasks.create_task(self._send_notices())

    # --- Frames that come ------------------------------------------------------------------

    async def _receive(self) -> bytes | None:
        """Return the next binary message, or `None` when there will be none."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            self._lost = message.get("code") not in _GOODBYES
            return None
        data: bytes | None = message.get("bytes")
        if data is None:
            await self._close(CLOSE_UNSUPPORTED_DATA, "frames are binary messages")
        return data

    async def _handle(self, message: bytes) -> None:
        """Answer one frame, or start the task that will."""
        self._metrics.received(self._model_id, PROTOCOL, len(message))
        try:
            frame = decode(message)
        except WireError as error:
            await self._send_error(error.request, error.session, "bad_frame", str(error))
            if not error.header_ok:
                await self._close(CLOSE_PROTOCOL_ERROR, "unreadable frame header")
            return
        self._table.note_received(self, frame.session, len(message))
        try:
            await self._dispatch(frame)
        except ManagerError as error:
            await self._send_refusal(frame, error)

    async def _dispatch(self, frame: Frame) -> None:
        """Do what a frame asks for."""
        match frame.kind:
            case Kind.STEP:
                self._start(frame, self._table.step)
            case Kind.ROLL_BACK:
                self._start(frame, self._table.roll_back)
            case Kind.REORDER:
                self._start(frame, self._table.reorder)
            case Kind.FORK:
                self._start(frame, self._fork)
            case Kind.OPEN:
                await self._open(frame)
            case Kind.RESUME:
                await self._resume(frame)
            case Kind.CLOSE:
                self._close_session(frame)
            case other:
                text = f"{other.name} is for the server to send"
                await self._send_error(frame.request, frame.session, "bad_frame", text)

    async def _open(self, frame: Frame) -> None:
        """Open a session."""
        wanted = _wishes(frame)
        with self._trace_of(wanted.pop(TRACEPARENT, None)):
            session = await self._table.open(self, self._model_id, client=self._client, **wanted)
        await self._send(self._opened(session, frame))

    async def _fork(self, session: Session, frame: Frame) -> bytes:
        """Open a session that holds what another holds."""
        return self._opened(await self._table.fork(session), frame)

    async def _resume(self, frame: Frame) -> None:
        """Take a session over from a connection that was lost."""
        token = frame.info.get("resume")
        try:
            if not isinstance(token, str):
                raise BadOpenError("RESUME has the session's token as resume")
            session = await self._table.resume(self, frame.session, token)
        except SessionError as error:
            await self._send_refusal(frame, error)
        else:
            await self._send(self._opened(session, frame))

    def _opened(self, session: Session, frame: Frame) -> bytes:
        """Return the answer that says what a session is."""
        contract = session.state.contract
        info = {
            "session": session.id,
            "hidden_size": contract.hidden_size,
            "dtype": contract.dtype.torch_name,
            "max_length": session.state.max_length,
            "idle_timeout": self._table.idle_timeout,
            "max_frame_bytes": self._max_frame_bytes,
        }
        if session.token:
            info |= {"resume": session.token, "resume_timeout": self._table.resume_timeout}
        length = session.state.length
        return encode(Frame(Kind.OPENED, frame.request, session.id, length, info=info))

    def _close_session(self, frame: Frame) -> None:
        """Close a session, when its step in flight is answered; `session_closed` answers."""
        session = self._table.find(self, frame.session)
        if session.id in self._closes:
            raise UnknownSessionError(f"session {session.id:#010x} is being closed already")
        self._closes[session.id] = frame.request
        self._table.close(session, CloseReason.CLOSED)

    def _start(self, frame: Frame, work: _Work) -> None:
        """Start the task that does what a frame asks of a session, and answers it."""
        session = self._table.claim(self, frame.session)
        session.task = self._tasks.create_task(self._answer(session, frame, work))
        # Not in the task itself: one that is cancelled before it begins runs none of its code.
        session.task.add_done_callback(lambda _: self._table.release(session))

    async def _answer(self, session: Session, frame: Frame, work: _Work) -> None:
        """Do it, and answer."""
        try:
            with self._traced(session, frame):
                reply = await work(session, frame)
        except ManagerError as error:
            await self._send_refusal(frame, error)
        else:
            session.sent += len(reply)
            await self._send(reply)

    def _trace_of(self, traceparent: str | None) -> AbstractContextManager[None]:
        """Return what lets a session be in its opener's trace, where there are traces."""
        return nullcontext() if self._tracing is None else self._tracing.opener(traceparent)

    def _traced(self, session: Session, frame: Frame) -> AbstractContextManager[None]:
        """Return what makes a span of what is asked of a session, likewise."""
        if self._tracing is None:
            return nullcontext()
        return self._tracing.step(session, frame.kind.name)

    # --- Frames that go --------------------------------------------------------------------

    async def _send_refusal(self, frame: Frame, error: ManagerError) -> None:
        """Answer a frame with an error; errors that are not of sessions are about the model."""
        code = error.code if isinstance(error, SessionError) else "model_unavailable"
        await self._send_error(frame.request, frame.session, code, str(error))

    async def _send_error(self, request: int, session: int, code: str, text: str) -> None:
        """Send an ERROR; the text may quote what the client sent, which can be long."""
        info = {"code": code, "message": text[:MAX_ERROR_TEXT]}
        await self._send(encode(Frame(Kind.ERROR, request, session, info=info)))

    async def _send(self, message: bytes) -> None:
        """Send one message, after the notices that came before it."""
        await self._send_notices()
        await self._write(message)

    async def _send_notices(self) -> None:
        """Send the notices that nobody has sent yet."""
        while self._notices:
            await self._write(self._notices.popleft())

    async def _write(self, message: bytes) -> None:
        """Write one message; waits while the client does not read, and drops it if it is gone."""
        if self._websocket.application_state is not WebSocketState.CONNECTED:
            return
        try:
            await self._websocket.send_bytes(message)
            self._metrics.sent(self._model_id, PROTOCOL, len(message))
        except WebSocketDisconnect:
            self._gone = True  # the reader finds out too, and ends the connection

    async def _close(self, code: int, reason: str) -> None:
        """Close the WebSocket; the reader then gets no more messages, and ends the connection."""
        await self._send_notices()
        if self._websocket.application_state is WebSocketState.CONNECTED:
            try:
                await self._websocket.close(code, reason)
            except WebSocketDisconnect:
                self._gone = True


def _wishes(frame: Frame) -> dict[str, Any]:
    """Return what OPEN asks for.

    Raises:
        BadOpenError: It asks for something else, or in another form.
    """
    known = ("max_length", "rows", "rollback", "resume", "timings", TRACEPARENT)
    if unknown := sorted(frame.info.keys() - set(known)):
        raise BadOpenError(f"OPEN has {', '.join(known)} or nothing, found {', '.join(unknown)}")
    for name in ("rollback", "resume", "timings"):
        if not isinstance(frame.info.get(name, False), bool):
            raise BadOpenError(f"{name} must be true or false, found {frame.info[name]!r}")
    if not isinstance(frame.info.get(TRACEPARENT, ""), str):
        raise BadOpenError(f"{TRACEPARENT} must be text, as W3C has it")
    return dict(frame.info)


async def _upgrade_required(request: Request) -> Response:
    """Say what this address is for."""
    del request
    raise HTTPException(
        HTTPStatus.UPGRADE_REQUIRED,
        f"sessions are a WebSocket with the subprotocol {SUBPROTOCOL}",
        {"Upgrade": "websocket"},
    )
