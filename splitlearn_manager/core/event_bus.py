"""Streams of events: any number of readers, of which none can hold up the writer.

Each reader has a queue of bounded length.  One that is too slow loses the oldest events in it, and
is told how many at the place where they would have been.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Self

from splitlearn_manager.core.events import Event, EventsLostEvent

if TYPE_CHECKING:
    from types import TracebackType

QUEUE_LENGTH = 1024
"""Events that wait for a reader before the oldest are dropped."""


class Subscription:
    """One reader's place in the stream: an async iterator that ends with the bus.

        with bus.subscribe() as events:
            async for event in events:
                ...

    Everything runs on the event loop's thread.
    """

    def __init__(self, bus: EventBus, length: int) -> None:
        if length < 1:
            raise ValueError(f"a queue of events needs room for 1 at least, found {length}")
        self._bus = bus
        self._length = length
        self._queue: deque[Event] = deque()
        self._lost: EventsLostEvent | None = None
        self._news = asyncio.Event()
        self._ended = False

    def __enter__(self) -> Self:
        """Begin to receive; what happened before is not in the stream."""
        self._bus.add(self)
        return self

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
        while not self._queue and not self._ended:
            self._news.clear()
            await self._news.wait()
        if self._lost is not None:
            lost, self._lost = self._lost, None
            return lost
        if not self._queue:
            raise StopAsyncIteration
        return self._queue.popleft()

    def put(self, event: Event) -> None:
        """Queue an event, in place of the oldest one if the queue is full."""
        if len(self._queue) >= self._length:
            dropped = self._queue.popleft()
            before = self._lost
            self._lost = EventsLostEvent(
                (before.count if before else 0) + 1, before.at if before else dropped.at
            )
        self._queue.append(event)
        self._news.set()

    def end(self) -> None:
        """Let the iteration end once the queue is empty."""
        self._ended = True
        self._news.set()


class EventBus:
    """Hands every event to every reader."""

    def __init__(self) -> None:
        self._readers: set[Subscription] = set()
        self._closed = False

    def subscribe(self, length: int = QUEUE_LENGTH) -> Subscription:
        """Return a place in the stream, to be entered.

        Args:
            length: Events that may wait for this reader.
        """
        return Subscription(self, length)

    def publish(self, event: Event) -> None:
        """Hand an event to every reader; never waits."""
        for reader in self._readers:
            reader.put(event)

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
