"""What happens to models, as server-sent events: `GET /v2/events`, with `?model=ID` for one alone.

    event: model           the present state of each model, once at the beginning
    event: transition      a move from one state to another
    event: progress        how far a load is
    event: reload_failed   the model stays as it was
    event: lost            the reader was too slow: so many events are not in the stream

Each has a number of its own stream as `id` and one JSON object as `data`.  A comment now and then
shows proxies that the stream lives.  It ends when the daemon shuts down.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.routing import Route

from splitlearn_manager.config.fields import check_model_id
from splitlearn_manager.core.events import (
    EventsLostEvent,
    ProgressEvent,
    ReloadFailedEvent,
    TransitionEvent,
)
from splitlearn_manager.core.states import state_name
from splitlearn_manager.errors import ModelNotFoundError
from splitlearn_manager.server.http_server import ABORT
from splitlearn_manager.server.model_state import snapshot
from splitlearn_manager.server.waiting import SHUTTING_DOWN, client_gone, first_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.event_bus import Subscription
    from splitlearn_manager.core.events import Event
    from splitlearn_manager.server.catalogue import Catalogue

PATH = "/v2/events"

KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent."""

FAREWELL = 1.0
"""Seconds that a reader is given to take in what is left, when the daemon shuts down."""

MOST_STREAMS = 64

_COMMENT = ": still here\n\n"
_NAMES: dict[type[Event], str] = {
    TransitionEvent: "transition",
    ProgressEvent: "progress",
    ReloadFailedEvent: "reload_failed",
    EventsLostEvent: "lost",
}
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
    (b"connection", b"close"),
]


class EventRoutes:
    """The route, over one manager.

    Args:
        manager: Whose events they are.
        catalogue: What is configured: it has a state, too.
        stopping: Set when the daemon begins to shut down.
    """

    def __init__(
        self, manager: AsyncModelManager, catalogue: Catalogue, stopping: asyncio.Event
    ) -> None:
        self._manager = manager
        self._catalogue = catalogue
        self._stopping = stopping
        self.streams = 0

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route(PATH, self.open, methods=["GET"])]

    async def open(self, request: Request) -> Any:
        """Return a stream as a response.

        Raises:
            HTTPException: 400 for what is no model's id, 429 where there are too many, 503 at the
                end.
            ModelNotFoundError: There is no such model.
        """
        model_id = request.query_params.get("model")
        if self._stopping.is_set():
            raise HTTPException(503, SHUTTING_DOWN)
        if self.streams >= MOST_STREAMS:
            raise HTTPException(429, f"{MOST_STREAMS} streams of events are open already")
        await self._check(model_id)
        return self._stream(model_id)

    async def _check(self, model_id: str | None) -> None:
        if model_id is None:
            return
        try:
            check_model_id(model_id)
        except ValueError as error:
            raise HTTPException(400, f"model {error}") from None
        try:
            await self._manager.get_model_info(model_id)
        except ModelNotFoundError:
            self._catalogue.config(model_id)

    def _stream(self, model_id: str | None) -> Any:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            self.streams += 1
            try:
                with self._manager.subscribe() as events:
                    await self._serve(events, model_id, scope, receive, send)
            finally:
                self.streams -= 1

        return run

    async def _serve(
        self,
        events: Subscription,
        model_id: str | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send events until the client is gone, or the daemon shuts down."""
        sending = asyncio.create_task(self._send(events, model_id, send))
        try:
            await first_of(
                asyncio.wait({sending}), client_gone(receive), self._ended(events, sending)
            )
            if sending.done():
                sending.result()
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.wait({sending})
                _abort(scope)  # what was written would hold up the end as long as nobody reads it

    async def _ended(self, events: Subscription, sending: asyncio.Task[None]) -> None:
        """Return when the daemon shuts down, and the reader has had time for what is left."""
        await self._stopping.wait()
        events.end()
        await asyncio.wait({sending}, timeout=FAREWELL)

    async def _send(self, events: Subscription, model_id: str | None, send: Send) -> None:
        """Write the response; waits while the client does not read."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for text in self._texts(events, model_id):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _texts(self, events: Subscription, model_id: str | None) -> AsyncIterator[str]:
        """Yield the stream's parts, as they go over the wire."""
        number = 0
        for model in await snapshot(self._manager, self._catalogue):
            if model_id in {None, model["model_id"]}:
                number += 1
                yield server_sent("model", number, model)
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    event = await anext(events)
            except TimeoutError:
                yield _COMMENT
            except StopAsyncIteration:
                return
            else:
                if model_id in {None, getattr(event, "model_id", model_id)}:
                    number += 1
                    yield server_sent(_NAMES[type(event)], number, event_json(event))


def _abort(scope: Scope) -> None:
    """Drop the connection, with whatever nobody has read."""
    abort = scope.get("extensions", {}).get(ABORT)
    if abort is not None:
        abort()


def event_json(event: Event) -> dict[str, Any]:
    """Return an event as plain values."""
    values = asdict(event)
    if isinstance(event, TransitionEvent):
        values |= {"old": state_name(event.old), "new": state_name(event.new)}
    return values


def server_sent(name: str, number: int, data: dict[str, Any]) -> str:
    """Return one event as the HTML standard has it."""
    return f"event: {name}\nid: {number}\ndata: {json.dumps(data)}\n\n"
