"""A server of sessions that does what a test tells it to: what a real one can't be made to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve
from websockets.typing import Subprotocol

from splitlearn_manager.serving.wire import SUBPROTOCOL, Frame, Kind, decode, encode

FACTS = {
    "component": "trunk",
    "model_type": "fake",
    "start_layer": "1",
    "end_layer": "3",
    "num_layers": "5",
    "hidden_size": "4",
    "dtype": "float32",
    "num_parameters": "20",
    "nbytes": "80",
    "rolls_back": "True",
}


class FakeTrunk:
    """What such a server does with each connection; subclasses change it.

    It answers a step with what came in, and knows a session by its number.

    Attributes:
        facts: What it says of its model.
        status: What it answers instead, with `text` and `headers`, when it is not 200.
        seen: The frames that came.
    """

    def __init__(self, **facts: str) -> None:
        self.facts = FACTS | facts
        self.status = 200
        self.text = "not now"
        self.headers: dict[str, str] = {}
        self.seen: list[Frame] = []
        self.opened = 0

    def talk(self, peer: ServerConnection) -> None:
        """Answer the frames of a connection."""
        for message in peer:
            assert isinstance(message, bytes)
            frame = decode(message)
            self.seen.append(frame)
            self.answer(peer, frame)

    def answer(self, peer: ServerConnection, frame: Frame) -> None:
        """Answer one frame."""
        match frame.kind:
            case Kind.OPEN:
                self.opened += 1
                self.say(peer, Frame(Kind.OPENED, frame.request, self.opened, info=self.opening()))
            case Kind.STEP:
                self.say(peer, self.result(frame))
            case Kind.CLOSE:
                info = {"reason": "closed"}
                self.say(peer, Frame(Kind.CLOSED, frame.request, frame.session, info=info))
            case Kind.FORK:
                self.opened += 1
                self.say(peer, Frame(Kind.OPENED, frame.request, self.opened, info=self.opening()))
            case Kind.RESUME:
                self.refuse(peer, frame, "unknown_session")
            case _:
                self.say(peer, Frame(Kind.DONE, frame.request, frame.session))

    def opening(self) -> dict[str, Any]:
        """Return what OPENED says."""
        return {"max_frame_bytes": 1 << 26}

    def result(self, frame: Frame) -> Frame:
        """Return the answer to a step."""
        return Frame(Kind.RESULT, frame.request, frame.session, tensors=frame.tensors[:1])

    def refuse(self, peer: ServerConnection, frame: Frame, code: str, **more: Any) -> None:
        """Answer a frame with an error."""
        info = {"code": code, "message": f"it is {code}", **more}
        self.say(peer, Frame(Kind.ERROR, frame.request, frame.session, info=info))

    @staticmethod
    def say(peer: ServerConnection, frame: Frame) -> None:
        """Send a frame."""
        peer.send(encode(frame))

    def count(self, kind: Kind) -> int:
        """Return how many frames of a kind came."""
        return sum(frame.kind is kind for frame in self.seen)

    def _describe(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP; `None` for a WebSocket."""
        del connection
        if self.status != 200:
            body = json.dumps({"error": self.text}).encode()
            headers = Headers(**{"Content-Length": str(len(body)), **self.headers})
            return Response(self.status, "No", headers, body)
        if "Upgrade" in request.headers:
            return None
        body = json.dumps({"name": "trunk", "properties": self.facts}).encode()
        return Response(200, "OK", Headers({"Content-Length": str(len(body))}), body)

    @contextmanager
    def run(self, port: int = 0) -> Iterator[str]:
        """Serve, and return the address."""
        with (
            serve(
                self.talk,
                "127.0.0.1",
                port,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                process_request=self._describe,
                compression=None,
                max_queue=1,
                max_size=None,
                close_timeout=0.5,
            ) as server,
            in_thread(server.serve_forever, server.shutdown),
        ):
            yield f"http://127.0.0.1:{port_of(server)}"


def port_of(server: Server) -> int:
    """Return where a server listens."""
    port: int = server.socket.getsockname()[1]
    return port


@contextmanager
def in_thread(work: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    """Run something in a thread, until it is told to end."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end()
        thread.join(30)
