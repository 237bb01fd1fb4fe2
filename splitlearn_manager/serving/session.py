"""One session: a client's place in one model, as the table of sessions has it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from splitlearn_manager.serving.batcher import Batcher, ForwardMetrics
from splitlearn_manager.serving.step import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.lease import Hold
    from splitlearn_manager.serving.usage import ModelUsage
    from splitlearn_manager.serving.wire import CloseReason, Frame


_EDGE = 4096
"""Bytes at either end of a tensor by which a request is known again."""


class SessionOwner(Protocol):
    """What the table asks of a connection."""

    def session_closed(self, session: Session, reason: CloseReason) -> None:
        """Hear that one of its sessions has ended; must not block."""
        ...


class SessionMetrics(ForwardMetrics, Protocol):
    """What the table reports."""

    def follow_sessions(self, usage: Callable[[], Mapping[str, ModelUsage]]) -> None:
        """Remember how to find out what sessions take."""
        ...

    def session_opened(self, model_id: str) -> None:
        """Count a session that was opened."""
        ...

    def session_ended(self, model_id: str, reason: str) -> None:
        """Count a session that has ended, and why."""
        ...

    def session_step(
        self, model_id: str, code: str, seconds: float, tokens: int, phase: str
    ) -> None:
        """Count a step: its outcome (`ok` or an error's code), how long it took, its positions."""
        ...


class SessionObserver(Protocol):
    """Who hears of every session, in the task that opens or ends it; must not block."""

    def session_opened(self, session: Session) -> None:
        """Hear that a session was opened."""
        ...

    def session_ended(self, session: Session, reason: CloseReason) -> None:
        """Hear that it has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered: sent again, it is answered again, and not done.

    Attributes:
        fingerprint: Kind, number, position, and as much of the rest as is cheap to compare.
        reply: The answer.
    """

    fingerprint: tuple[object, ...]
    reply: bytes

    @classmethod
    def of(cls, frame: Frame, reply: bytes) -> Self:
        """Return what is kept of an answered request."""
        return cls(_fingerprint(frame), reply)

    def is_for(self, frame: Frame) -> bool:
        """Whether a frame is the same request."""
        return _fingerprint(frame) == self.fingerprint


def _fingerprint(frame: Frame) -> tuple[object, ...]:
    tensors = (
        (t.name, t.dtype, t.shape, bytes(t.data[:_EDGE]), bytes(t.data[-_EDGE:]))
        for t in frame.tensors
    )
    return (frame.kind, frame.request, frame.position, str(dict(frame.info)), *tensors)


@dataclass(eq=False, slots=True)
class Session:
    """One client's place in one model.

    Attributes:
        id: Random, so that nobody meets another's by counting; never 0.
        owner: The connection that opened it.
        managed: The model, as it was loaded then.
        batcher: Whoever runs its steps, with those of others.
        state: Its cache, and what was taken in so far.
        client: Who opened it, and has what it holds on its account.
        last_used: When a step last began or ended, by the table's clock.
        hold: What keeps the model for it.
        task: The task that runs and answers its one step, while there is one.
        busy: Whether a step was claimed and not yet released.
        ending: Why it is to end at its release.
        token: What proves to be its client, when its connection was lost; empty where it is to end
            with its connection.
        last: The step that was answered last, where it may have to be answered again.
        absence: What ends it unless its client comes back, while it has no connection.
        steps: Steps that it was sent, refused ones too.
        tokens: Positions that were computed for it, times rows.
        received: Bytes of frames that came for it.
        sent: Bytes of the answers to them.
    """

    id: int
    owner: SessionOwner
    managed: AsyncManagedModel
    batcher: Batcher
    state: State
    client: str
    last_used: float
    hold: Hold | None = None
    task: asyncio.Task[None] | None = None
    busy: bool = False
    ending: CloseReason | None = None
    token: str = ""
    last: Answered | None = None
    absence: asyncio.Task[None] | None = None
    steps: int = 0
    tokens: int = 0
    received: int = 0
    sent: int = 0

    @property
    def model_id(self) -> str:
        """Id of its model."""
        return self.managed.model_id
