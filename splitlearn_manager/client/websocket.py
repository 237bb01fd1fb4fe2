"""A WebSocket in the calling thread: nothing runs between calls.

The protocol is websockets' own (its Sans-I/O half); what is here moves its bytes.  Whoever waits
for an answer reads the socket itself: to be woken by another thread takes as long as a small step.
Whoever sends reads as well where the other side does not take in what is sent: it may be waiting
for its own answers to be taken in.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

if TYPE_CHECKING:
    from collections.abc import Mapping

RECEIVE_BYTES = 1 << 18
MAX_MESSAGE = 1 << 30
"""Longest message that is read; an answer is as long as its step."""

CLOSE_TIMEOUT = 1.0

_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a socket raises that would have to wait."""


class WebSocketLost(Exception):  # noqa: N818 - not an error of its own: it becomes one of ours
    """The connection has ended, or can't be used further; says why."""


class WebSocket:
    """One connection, for one thread at a time.

    Args:
        sock: A connected socket, which this object closes.
        url: `ws://…` or `wss://…`.
        subprotocol: What both sides are to speak.
        headers: What the handshake carries besides.
        tls: How to make sure of the server, for `wss`.
        handshake_timeout: Seconds for the opening handshake.
        send_timeout: Seconds for the other side to take in a message.

    Raises:
        InvalidHandshake: The server does not agree; `InvalidStatus` has its answer.
        OSError: The handshake took too long, or the server could not be made sure of.
        WebSocketLost: The connection was lost.
    """

    def __init__(
        self,
        sock: socket.socket,
        url: str,
        *,
        subprotocol: str,
        headers: Mapping[str, str],
        tls: ssl.SSLContext | None,
        handshake_timeout: float,
        send_timeout: float,
    ) -> None:
        self._send_timeout = send_timeout
        self._messages: deque[bytes | bytearray] = deque()
        self._fragments: list[bytes | bytearray] = []
        self._outgoing: deque[memoryview] = deque()
        self._broken: str | None = None
        uri = parse_uri(url)
        self._protocol = ClientProtocol(
            uri, subprotocols=[Subprotocol(subprotocol)], max_size=MAX_MESSAGE
        )
        self._socket = sock
        self._events = select.poll()
        try:
            sock.settimeout(handshake_timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            if tls is not None:
                self._socket = tls.wrap_socket(sock, server_hostname=uri.host)
            self._socket.setblocking(False)
            self._shake_hands(headers, handshake_timeout)
        except BaseException:
            self._socket.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent, as far as is known here."""
        return self._broken is None and self._protocol.state is State.OPEN

    def send(self, *messages: bytes) -> None:
        """Send binary messages; what comes meanwhile is kept for `receive`.

        Raises:
            WebSocketLost: The connection has ended, or a message was not taken in in time.
        """
        for message in messages:
            if not self.is_open:
                raise self._lost()
            self._protocol.send_binary(message)
            self._flush()

    def receive(self, timeout: float) -> bytes | bytearray:
        """Return the next message.

        Raises:
            TimeoutError: None came in time; it can still come.
            WebSocketLost: There will be none.
        """
        deadline = time.monotonic() + timeout
        while not self._messages:
            if not self.is_open:
                raise self._lost()
            self._read(deadline)
        return self._messages.popleft()

    def tend(self) -> None:
        """Answer the pings that came meanwhile, without waiting for any.

        Raises:
            WebSocketLost: The connection was lost.
        """
        self._take_in()
        self._flush()

    def close(self) -> None:
        """Say good-bye, wait a moment for the answer, and close the socket."""
        deadline = time.monotonic() + CLOSE_TIMEOUT
        with suppress(WebSocketLost, TimeoutError, InvalidState), self._socket:
            self._protocol.send_close(1000)
            self._flush()
            while self._protocol.state is not State.CLOSED:
                self._read(deadline)

    def drop(self) -> None:
        """Close the socket without a word."""
        self._socket.close()

    def _shake_hands(self, headers: Mapping[str, str], timeout: float) -> None:
        """Make the opening handshake."""
        deadline = time.monotonic() + timeout
        request = self._protocol.connect()
        request.headers.update(headers)
        self._protocol.send_request(request)
        self._flush()
        while self._protocol.state is State.CONNECTING:
            self._read(deadline)
        if self._protocol.handshake_exc is not None:
            raise self._protocol.handshake_exc

    def _read(self, deadline: float) -> None:
        """Take in what the socket has, waiting for it until the deadline."""
        if not (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            self._wait(select.POLLIN, deadline)
        self._take_in()
        self._flush()

    def _wait(self, events: int, deadline: float) -> None:
        """Wait until the socket can be read, or written to.

        Raises:
            TimeoutError: It could not be in time.
        """
        self._events.register(self._socket, events)
        left = deadline - time.monotonic()
        if not self._events.poll(max(0, math.ceil(1000 * left))):
            raise TimeoutError

    def _take_in(self) -> None:
        """Give what the socket has to the protocol, and keep its messages."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except _LATER:
            return
        except OSError as error:
            raise self._break(error.strerror or str(error)) from error
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._keep(event)
        if not data:
            self._outgoing.clear()
            self._broken = self._broken or str(self._lost())

    def _keep(self, frame: Frame) -> None:
        """Keep a message, or a part of one."""
        if frame.opcode not in {Opcode.BINARY, Opcode.CONT}:
            return
        self._fragments.append(frame.data)  # type: ignore[arg-type]  # what is received is these
        if frame.fin:
            parts, self._fragments = self._fragments, []
            self._messages.append(parts[0] if len(parts) == 1 else b"".join(parts))

    def _flush(self) -> None:
        """Send what the protocol has to say."""
        self._collect()
        deadline = time.monotonic() + self._send_timeout
        while self._outgoing:
            if self._write():
                continue
            try:
                self._wait(select.POLLIN | select.POLLOUT, deadline)
            except TimeoutError as error:  # how much went through is not known
                raise self._break("timed out") from error
            self._take_in()
            self._collect()

    def _collect(self) -> None:
        """Put what the protocol has to say behind what is being sent."""
        for data in self._protocol.data_to_send():
            if self._broken is None:
                self._outgoing.append(memoryview(data))

    def _write(self) -> bool:
        """Send as much as the socket takes now; return whether it took something."""
        data = self._outgoing[0]
        try:
            if data:
                sent = self._socket.send(data)
            else:  # the protocol's word for the end
                self._socket.shutdown(socket.SHUT_WR)
                sent = 0
        except _LATER:
            return False
        except OSError as error:
            raise self._break(error.strerror or str(error)) from error
        if sent < len(data):
            self._outgoing[0] = data[sent:]
        else:
            self._outgoing.popleft()
        return True

    def _break(self, reason: str) -> WebSocketLost:
        """Note that the connection can't be used any more, and return what to raise."""
        self._outgoing.clear()
        self._broken = reason
        return WebSocketLost(reason)

    def _lost(self) -> WebSocketLost:
        """Return why there is no connection."""
        if self._broken is not None:
            return WebSocketLost(self._broken)
        said = self._protocol.close_rcvd
        return WebSocketLost(f"closed by the server: {said}" if said else "the server is gone")
