"""A request's JSON body, which is short, and may be missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

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
