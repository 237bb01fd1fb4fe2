"""A request's body: a short JSON object, which may be missing, or any bytes, within limits."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from splitlearn_manager.server.waiting import BYTES_PER_SECOND, PATIENCE
from splitlearn_manager.serving.infer_errors import BodyTooLargeError, SlowBodyError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_JSON_BYTES = 64 * 1024
"""Longest body that is read as JSON; real ones are a few bytes."""


async def json_object(request: Request) -> dict[str, Any]:
    """Return a request's JSON object; an empty body is an empty one, whatever its type.

    Raises:
        HTTPException: 400 where it is no JSON object, 413 where it is too long.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise HTTPException(400, f"the body must be a JSON object, found {type(value).__name__}")
    return value


async def whole_body(request: Request, limit: int) -> bytearray:
    """Return a request's body, in a buffer that is the caller's own.

    Raises:
        BodyTooLargeError: It is longer than `limit` bytes, or says that it will be.
        SlowBodyError: It comes too slowly.
        ClientDisconnect: The client has gone.
    """
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told) > limit:
        raise _too_long(limit)
    body = bytearray()
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(started + PATIENCE) as deadline:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_long(limit)
                earned = len(body) / BYTES_PER_SECOND
                deadline.reschedule(started + PATIENCE + earned)
    except TimeoutError:
        raise SlowBodyError(
            f"only {len(body)} bytes of the body came in time; at least"
            f" {BYTES_PER_SECOND} a second are expected after {PATIENCE:g} s"
        ) from None
    return body


def _too_long(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body is longer than the {limit} bytes that are read (server.max_frame_bytes)"
    )
