"""Streams of events: any number of readers, of which none can hold up the writer.

Each reader has a queue of bounded length.  One that is too slow loses the oldest events in it, and
is told how many at the place where they would have been.

Every event has a position, and the last ones are kept: a reader that was away goes on where it was,
or is told that it can't.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Self

from splitlearn_manager.core.events import Event, EventsLostEvent

if TYPE_CHECKING:
    from types import TracebackType

QUEUE_LENGTH = 1024
"""Events that wait for a reader before the oldest are dropped."""

HISTORY_LENGTH = QUEUE_LENGTH
"""Events that are kept for readers that come back; no more than wait for one."""

_POSITION = re.compile(r"([0-9a-f]{8})-(\d{1,18})", re.ASCII)


class Subscription:
    """One reader's place in the stream: an async iterator that ends with the bus.

        with bus.subscribe() as events:
            async for event in events:
                ...

    Everything runs on the event loop's thread.

    Attributes:
        position: Where the reader is: after the last event that it was given, or where it began.
        resumed: Whether it went on where it was, with nothing lost.
    """

    def __init__(self, bus: EventBus, length: int, after: str | None = None) -> None:
        if length < 1:
            raise ValueError(f"a queue of events needs room for 1 at least, found {length}")
        self._bus = bus
        self._length = length
        self._after = after
        self._queue: deque[tuple[int, Event]] = deque()
        self._lost: EventsLostEvent | None = None
        self._news = asyncio.Event()
        self._ended = False
        self.position = ""
        self.resumed = False

    def __enter__(self) -> Self:
        """Begin to receive; what happened before is not in the stream, unless it goes on."""
        self._bus.add(self)
        self.position = self._bus.position()
        if self._after is not None:
            self._go_on(self._after)
        return self

    def _go_on(self, after: str) -> None:
        """Queue what was missed, if that is all there."""
        missed = self._bus.since(after)
        if isinstance(missed, EventsLostEvent):
            self._lost = missed
            return
        self.position, self.resumed = after, True
        for number, event in missed:
            self.put(number, event)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Receive no more."""
        self._bus.discard(self)

    def __aiter__(self) -> Self:
        """Return the iterator itself."""
        return self

    async def __anext__(self) -> Event:
        """Wait for the next event."""
        while not (self._queue or self._lost or self._ended):
            self._news.clear()
            await self._news.wait()
        if (lost := self.take_lost()) is not None:
            return lost
        if not self._queue:
            raise StopAsyncIteration
        number, event = self._queue.popleft()
        self.position = self._bus.position(number)
        return event

    def take_lost(self) -> EventsLostEvent | None:
        """Return what was lost, once, without waiting for an event."""
        lost, self._lost = self._lost, None
        return lost

    def put(self, number: int, event: Event) -> None:
        """Queue an event, in place of the oldest one if the queue is full."""
        if len(self._queue) >= self._length:
            _, dropped = self._queue.popleft()
            self._lost = _one_more(self._lost, dropped)
        self._queue.append((number, event))
        self._news.set()

    def end(self) -> None:
        """Let the iteration end once the queue is empty."""
        self._ended = True
        self._news.set()


def _one_more(lost: EventsLostEvent | None, dropped: Event) -> EventsLostEvent:
    """Return what a reader is told that has lost one event more."""
    if lost is None:
        return EventsLostEvent(1, dropped.at)
    return EventsLostEvent(None if lost.count is None else lost.count + 1, lost.at)


class EventBus:
    """Hands every event to every reader."""

    def __init__(self) -> None:
        self._readers: set[Subscription] = set()
        self._closed = False
        self._name = secrets.token_hex(4)  # a position in another stream is none in this
        self._number = 0
        self._history: deque[tuple[int, Event]] = deque(maxlen=HISTORY_LENGTH)

    def subscribe(self, length: int = QUEUE_LENGTH, after: str | None = None) -> Subscription:
        """Return a place in the stream, to be entered.

        Args:
            length: Events that may wait for this reader.
            after: A position where it was before.
        """
        return Subscription(self, length, after)

    def publish(self, event: Event) -> None:
        """Hand an event to every reader; never waits."""
        self._number += 1
        self._history.append((self._number, event))
        for reader in self._readers:
            reader.put(self._number, event)

    def position(self, number: int | None = None) -> str:
        """Return the position after an event; after the last one, if no number is given."""
        return f"{self._name}-{self._number if number is None else number}"

    def since(self, position: str) -> list[tuple[int, Event]] | EventsLostEvent:
        """Return all events after a position, or that they are not there any more."""
        match = _POSITION.fullmatch(position)
        if match is None or match[1] != self._name or int(match[2]) > self._number:
            return EventsLostEvent(None, time.time())
        number = int(match[2])
        missed = [(n, event) for n, event in self._history if n > number]
        if len(missed) == self._number - number:
            return missed
        return EventsLostEvent(self._number - number, missed[0][1].at)

    def close(self) -> None:
        """End every stream, and every later one at once."""
        self._closed = True
        for reader in self._readers:
            reader.end()

    def add(self, reader: Subscription) -> None:
        """Begin to hand events to a reader."""
        self._readers.add(reader)
        if self._closed:
            reader.end()

    def discard(self, reader: Subscription) -> None:
        """Hand no more events to a reader."""
        self._readers.discard(reader)

    def __len__(self) -> int:
        """Return the number of readers."""
        return len(self._readers)
