"""Answers in the form that clients of the Open Inference Protocol read.

An error is `{"error": "text"}`, and the text has to be a string: the clients print it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Receive, Scope, Send

    from splitlearn_manager.errors import ManagerError


def error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error."""
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def manager_error_response(error: ManagerError) -> JSONResponse:
    """Return an error of ours, with the status, and the time to come again, that it asks for."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return error_response(error.http_status, str(error), headers)


async def refuse_websocket(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a WebSocket's handshake with an HTTP response, where the ASGI server can do that."""
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})
