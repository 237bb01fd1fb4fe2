"""What can go wrong with an inference request; each is one answer, `{"error": "text"}`.

InferError (ManagerError)                     HTTP  code
├── BadInferError (ValueError)                400   bad_request
├── SlowBodyError (TimeoutError)              408   slow_body
├── BodyTooLargeError (ValueError)            413   too_large
├── UnsupportedEncodingError (ValueError)     415   unsupported_encoding
├── OverloadedError (RuntimeError)            429   overloaded
│   └── ClientBusyError                       429   client_limit
├── InferFailedError (RuntimeError)           500   internal
└── ShuttingDownError (RuntimeError)          503   draining
"""

from __future__ import annotations

from splitlearn_manager.errors import ManagerError


class InferError(ManagerError):
    """Base of the errors of inference requests."""


class BadInferError(InferError, ValueError):
    """The request is none, or does not fit the model; nothing has run.

    The message names the tensor, what was expected and what was found.
    """

    http_status = 400
    code = "bad_request"


class SlowBodyError(InferError, TimeoutError):
    """The body came too slowly: a place in the queue can't be kept for it."""

    http_status = 408
    code = "slow_body"


class BodyTooLargeError(InferError, ValueError):
    """The body, or what it is when decompressed, is longer than the server reads."""

    http_status = 413
    code = "too_large"


class UnsupportedEncodingError(InferError, ValueError):
    """The body is compressed in a way that the server does not read."""

    http_status = 415
    code = "unsupported_encoding"


class OverloadedError(InferError, RuntimeError):
    """The model has as many requests as it may; ask again when some have been answered."""

    http_status = 429
    code = "overloaded"
    retry_after = 1


class ClientBusyError(OverloadedError):
    """The client has as many requests as it may; ask again when some have been answered."""

    code = "client_limit"


class InferFailedError(InferError, RuntimeError):
    """The forward failed.  The message has no details; the log has them under the request's id."""

    http_status = 500
    code = "internal"


class ShuttingDownError(InferError, RuntimeError):
    """The server is shutting down, and answers only what it has taken on."""

    http_status = 503
    code = "draining"
    retry_after = 1
