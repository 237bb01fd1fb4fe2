"""What can go wrong with a part that lives elsewhere.

SplitLearnError
├── RemoteError (RuntimeError)               the server refused, or failed at it; has a `code`
├── RemoteUnavailable (ConnectionError)      it can't be reached, or not now; try again later
└── RemoteSessionClosed (ConnectionError)    a cache there is gone; has a `reason`
"""

from __future__ import annotations

from splitlearn_core.errors import SplitLearnError


class RemoteError(SplitLearnError, RuntimeError):
    """The server refused a request, or could not do it; asking again the same way won't help.

    Attributes:
        code: A word for programs: that of the wire (`bad_step`, `too_long`, `internal`, …),
            `model_not_found`, `unsupported_component`, `unauthorized`, or `bad_answer` where what
            answers does not speak the protocol.
    """

    def __init__(self, message: str, code: str = "internal") -> None:
        super().__init__(message)
        self.code = code


class RemoteUnavailable(SplitLearnError, ConnectionError):  # noqa: N818 - users know this name
    """The server can't be reached, does not answer, or can't serve the model now."""


class RemoteSessionClosed(SplitLearnError, ConnectionError):  # noqa: N818 - users know this name
    """A cache on the server is gone, and with it what was computed; begin again with a new one.

    Attributes:
        reason: Why: `expired`, `draining`, `evicted`, `model_unloaded`, `internal` as the server
            says it, or `connection_lost`, `interrupted`, `closed` as it was noticed here.
    """

    def __init__(self, message: str, reason: str = "closed") -> None:
        super().__init__(message)
        self.reason = reason
