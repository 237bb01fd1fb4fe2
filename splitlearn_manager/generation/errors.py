"""What can go wrong with a request for text; each is one answer, `{"error": {…}}`.

GenerationError (ManagerError)                HTTP  code
├── BadRequestError (ValueError)              400   invalid_value, or what is told
│   ├── ContextLengthError                    400   context_length_exceeded
│   └── UnsupportedError                      400   unsupported_parameter
├── NotGenerativeError (ValueError)           400   model_not_generative
├── NotLoadedError (RuntimeError)             503   model_not_loaded
├── QueueFullError (RuntimeError)             429   overloaded
├── NoCacheMemoryError (RuntimeError)         503   no_memory
├── TrunkUnavailableError (ConnectionError)   503   trunk_unavailable
├── TrunkRefusedError (RuntimeError)          502   trunk_refused
└── GenerationFailedError (RuntimeError)      500   internal
"""

from __future__ import annotations

from splitlearn_manager.errors import ManagerError


class GenerationError(ManagerError):
    """Base of the errors of requests for text."""


class BadRequestError(GenerationError, ValueError):
    """The request is wrong; nothing has run.

    Attributes:
        param: Which of its values is wrong, where it is one of them.
    """

    http_status = 400
    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(BadRequestError):
    """Prompt and answer would be longer than the model's context; says all figures."""

    code = "context_length_exceeded"


class UnsupportedError(BadRequestError):
    """The request asks for something that would change the answer, and that there is not here."""

    code = "unsupported_parameter"


class NotGenerativeError(GenerationError, ValueError):
    """The model can't answer with text: it is a part of one, or has no tokenizer."""

    http_status = 400
    code = "model_not_generative"


class NotLoadedError(GenerationError, RuntimeError):
    """The model is configured, and not loaded; nobody loads it because a request names it."""

    http_status = 503
    code = "model_not_loaded"


class QueueFullError(GenerationError, RuntimeError):
    """As many requests wait as may; ask again when some have been answered."""

    http_status = 429
    code = "overloaded"
    retry_after = 1


class NoCacheMemoryError(GenerationError, RuntimeError):
    """The request's caches don't fit, nor would they when others have ended; says the figures."""

    http_status = 503
    code = "no_memory"


class TrunkUnavailableError(GenerationError, ConnectionError):
    """A Trunk went away, or can't take this on now; others are not concerned."""

    http_status = 503
    code = "trunk_unavailable"
    retry_after = 1


class TrunkRefusedError(GenerationError, RuntimeError):
    """A Trunk refused a step, and would again."""

    http_status = 502
    code = "trunk_refused"


class GenerationFailedError(GenerationError, RuntimeError):
    """The forward failed.  The message has no details; the log has them under the request's id."""

    http_status = 500
    code = "internal"
