"""Answers in the form that clients of the Open Inference Protocol read.

An error is `{"error": "text"}`, and the text has to be a string: the clients print it.  Below
`/v1` it has OpenAI's form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from splitlearn_manager.server.openai_answers import (
    error_headers,
    error_object,
    is_openai,
    manager_error_object,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Receive, Scope, Send

    from splitlearn_manager.errors import ManagerError


def error_response(
    path: str, status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error in the form of the protocol that a path is of."""
    body = error_object(status, message) if is_openai(path) else {"error": message}
    return JSONResponse(body, status_code=status, headers=headers)


def manager_error_response(path: str, error: ManagerError) -> JSONResponse:
    """Return an error of ours, with the status, and the time to come again, that it asks for."""
    if is_openai(path):
        body = manager_error_object(error)
        return JSONResponse(body, error.http_status, headers=error_headers(error))
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return error_response(path, error.http_status, str(error), headers)


async def refuse_websocket(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a WebSocket's handshake with an HTTP response, where the ASGI server can do that."""
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})
