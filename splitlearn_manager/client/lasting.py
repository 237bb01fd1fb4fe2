"""A session that is wanted whatever becomes of the server, and what is wanted of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_manager.client.history import History
from splitlearn_manager.serving.wire import Frame

if TYPE_CHECKING:
    import torch

    from splitlearn_manager.client.connection import RemoteSession, Request
    from splitlearn_manager.serving.wire import Kind


class LastingSession:
    """A session, and what brings another one to where it is.

    Args:
        limit: Bytes of history that are kept; 0 keeps none.
        traceparent: The span that it belongs to; `None` takes the one that opens it.

    Attributes:
        session: Where it is now; `None` before its first step.
        rollback: Whether its last step must always be possible to take back.
        history: What it was sent.
    """

    def __init__(self, limit: int, traceparent: str | None = None) -> None:
        self.session: RemoteSession | None = None
        self.rollback = False
        self.traceparent = traceparent
        self.history: History[torch.Tensor] = History(limit)

    def fork(self, session: RemoteSession | None) -> LastingSession:
        """Return another that holds the same, in a session of its own."""
        other = LastingSession(self.history.limit, self.traceparent)
        other.session, other.rollback = session, self.rollback
        other.history = self.history.copy()
        return other


@dataclass(eq=False)
class Want:
    """What is wanted of a session.

    Attributes:
        lasting: The session.
        frame: The question, without the numbers of session and request.
        expected: Kind of the answer.
        request: The question as it was asked last; `None` when it is to be asked.
        error: Why it can't be asked.
        given_up: Whether that is the last word.
    """

    lasting: LastingSession
    frame: Frame
    expected: Kind
    request: Request | None = None
    error: Exception | None = None
    given_up: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether it was done."""
        return self.request is not None and isinstance(self.request.answer, Frame)

    @property
    def failure(self) -> Exception:
        """Why it was not done."""
        answer = None if self.request is None else self.request.answer
        if self.error is not None:
            return self.error
        return answer if isinstance(answer, Exception) else RuntimeError("nobody asked")

    def result(self) -> Request:
        """Return the question that was answered, or raise why it was not."""
        if self.request is None or not self.is_answered:
            raise self.failure
        return self.request
