"""What can go wrong with a part that lives elsewhere.

SplitLearnError
├── RemoteError (RuntimeError)               the server refused, or failed at it; has a `code`
├── RemoteUnavailable (ConnectionError)      it can't be reached, or not now; try again later
└── RemoteSessionClosed (ConnectionError)    a cache there is gone; has a `reason`

Where it was tried to go on elsewhere, or again, and in vain, the last two have what was `tried`.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn_core.errors import SplitLearnError


@dataclass(frozen=True)
class Tried:
    """What came of trying to go on at an address.

    Attributes:
        address: Where.
        attempts: How often.
        reason: Why the last of them failed.
    """

    address: str
    attempts: int
    reason: str

    def __str__(self) -> str:
        """Say it."""
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        return f"{self.address} {times} ({self.reason})"


class RemoteError(SplitLearnError, RuntimeError):
    """The server refused a request, or could not do it; asking again the same way won't help.

    Attributes:
        code: A word for programs: that of the wire (`bad_step`, `too_long`, `internal`, …),
            `model_not_found`, `unsupported_component`, `unauthorized`, `another_model` where a
            server has not the Trunk that was begun with, or `bad_answer` where what answers does
            not speak the protocol.
    """

    def __init__(self, message: str, code: str = "internal") -> None:
        super().__init__(message)
        self.code = code


class RemoteUnavailable(SplitLearnError, ConnectionError):  # noqa: N818 - users know this name
    """The server can't be reached, does not answer, or can't serve the model now.

    Attributes:
        code: A word for programs: that of the wire (`too_many_sessions`, `no_memory`, …),
            `unavailable` for an HTTP status that says so, `certificate`, or `unreachable`.
        retry_after: Seconds after which the server says that it is worth asking again.
        tried: What was tried, for so many `seconds`.
    """

    def __init__(
        self,
        message: str,
        code: str = "unreachable",
        retry_after: float | None = None,
        tried: tuple[Tried, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.tried = tried
        self.seconds = seconds


class RemoteSessionClosed(SplitLearnError, ConnectionError):  # noqa: N818 - users know this name
    """A cache on the server is gone, and with it what was computed; begin again with a new one.

    Attributes:
        reason: Why: `expired`, `draining`, `evicted`, `model_unloaded`, `internal` as the server
            says it, or `connection_lost`, `interrupted`, `closed` as it was noticed here.
        tried: What was tried in order to go on, for so many `seconds`.
    """

    def __init__(
        self,
        message: str,
        reason: str = "closed",
        tried: tuple[Tried, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.tried = tried
        self.seconds = seconds
