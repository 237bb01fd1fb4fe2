"""What can go wrong with a session; each error is one answer on the wire.

    SessionError (ManagerError)                   HTTP  code
    ├── BadOpenError (ValueError)                 400   bad_open
    ├── BadStepError (ValueError)                 400   bad_step
    ├── BadPositionError (ValueError)             409   bad_position
    ├── RollBackError (ValueError)                409   roll_back
    ├── TooLongError (ValueError)                 400   too_long
    ├── UnsupportedComponentError (ValueError)    400   unsupported_component
    ├── UnknownSessionError (KeyError)            404   unknown_session
    ├── ClientLimitError (RuntimeError)           429   client_limit
    ├── TooManySessionsError (RuntimeError)       503   too_many_sessions
    ├── NoMemoryError (RuntimeError)              503   no_memory
    ├── ModelUnavailableError (RuntimeError)      503   model_unavailable
    ├── DrainingError (RuntimeError)              503   draining
    └── StepFailedError (RuntimeError)            500   internal
        └── NotFiniteError (ArithmeticError)      500   not_finite

All but the last two leave the session as it was: a step that is refused was not run.
"""

from __future__ import annotations

from splitlearn_manager.errors import ManagerError


class SessionError(ManagerError):
    """Base of the errors of sessions."""


class BadOpenError(SessionError, ValueError):
    """The client asked for a session in terms that there are none in."""

    http_status = 400
    code = "bad_open"


class BadStepError(SessionError, ValueError):
    """A step's tensors are not of the shape or dtype that the session takes, or it came too early.

    The client is at fault; the message says what was expected and what was found.
    """

    http_status = 400
    code = "bad_step"


class BadPositionError(SessionError, ValueError):
    """Client and server don't agree on how many positions are in the cache; says both numbers."""

    http_status = 409
    code = "bad_position"


class RollBackError(SessionError, ValueError):
    """The session can't forget what it is asked to forget; says why."""

    http_status = 409
    code = "roll_back"


class TooLongError(SessionError, ValueError):
    """The step would go beyond the positions that the session has; says both numbers."""

    http_status = 400
    code = "too_long"


class UnsupportedComponentError(SessionError, ValueError):
    """The model is no Trunk: it does not take hidden states and give hidden states."""

    http_status = 400
    code = "unsupported_component"


class UnknownSessionError(SessionError, KeyError):
    """The connection has no session with that id: it was never opened here, or has ended."""

    http_status = 404
    code = "unknown_session"

    def __str__(self) -> str:
        """Return the sentence itself: `KeyError` would show its repr."""
        return str(self.args[0]) if self.args else ""


class ClientLimitError(SessionError, RuntimeError):
    """The client holds as much as it may; says what it holds, wants and may have.

    Others are not concerned: it may have more when it has closed something.
    """

    http_status = 429
    code = "client_limit"
    retry_after = 1


class TooManySessionsError(SessionError, RuntimeError):
    """The server holds as many sessions as it may; ask again when others have ended."""

    http_status = 503
    code = "too_many_sessions"
    retry_after = 1


class NoMemoryError(SessionError, RuntimeError):
    """The session's cache does not fit; says how much it would take, and how much there is."""

    http_status = 503
    code = "no_memory"


class ModelUnavailableError(SessionError, RuntimeError):
    """The session's model was unloaded or replaced, and the session ended with it."""

    http_status = 503
    code = "model_unavailable"
    retry_after = 1


class DrainingError(SessionError, RuntimeError):
    """The server is shutting down and opens no more sessions."""

    http_status = 503
    code = "draining"


class StepFailedError(SessionError, RuntimeError):
    """The forward failed, and the session is over: its cache may be half-filled.

    The message has no details; the server's log has them under the same session id.
    """

    http_status = 500
    code = "internal"


class NotFiniteError(StepFailedError, ArithmeticError):
    """What the part computed is not finite, and so is what the session's cache now holds.

    The message says at which row and position.  The session is over: whatever is computed from
    such a cache is no number either, in forwards that others share.
    """

    code = "not_finite"
