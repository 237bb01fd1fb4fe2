"""What happens to models, as server-sent events: `GET /v2/events`, with `?model=ID` for one alone.

    event: model           the present state of each model, once at the beginning
    event: transition      a move from one state to another
    event: progress        how far a load is
    event: reload_failed   the model stays as it was
    event: lost            the reader was too slow, or away: so many events are not in the stream

Each has one JSON object as `data`, and its position as `id`, where a reader can go on: one that
comes back with that as its `Last-Event-ID` gets what it has missed, and no states.  Where that is
not there any more (a bounded number is kept, and none over a new start), it gets `lost`, then the
states.  Of these only the last has an `id`: who has not all of them must begin again.

A comment now and then shows proxies that the stream lives.  It ends when the daemon shuts down.
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
        return self._stream(model_id, request.headers.get("last-event-id") or None)

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

    def _stream(self, model_id: str | None, after: str | None) -> Any:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            self.streams += 1
            try:
                with self._manager.subscribe(after) as events:
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
        if not events.resumed:
            async for text in self._states(events, model_id):
                yield text
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
                    yield _as_text(event, events.position)

    async def _states(self, events: Subscription, model_id: str | None) -> AsyncIterator[str]:
        """Yield the states of models, after word of what was lost before them."""
        begins = events.position
        if (lost := events.take_lost()) is not None:
            yield _as_text(lost, "")
        models = await snapshot(self._manager, self._catalogue)
        wanted = [model for model in models if model_id in {None, model["model_id"]}]
        for model in wanted:
            yield server_sent("model", model, begins if model is wanted[-1] else "")


def _as_text(event: Event, position: str) -> str:
    """Return an event as it goes over the wire; word of a loss is no place to go on."""
    lost = isinstance(event, EventsLostEvent)
    return server_sent(_NAMES[type(event)], event_json(event), "" if lost else position)


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


def server_sent(name: str, data: dict[str, Any], position: str = "") -> str:
    """Return one event as the HTML standard has it."""
    id_line = f"id: {position}\n" if position else ""
    return f"event: {name}\n{id_line}data: {json.dumps(data)}\n\n"
