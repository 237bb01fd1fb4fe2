"""A daemon's models, seen and managed from elsewhere.  Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote, urlencode

from splitlearn_manager.client.address import Address
from splitlearn_manager.client.errors import RemoteError

MODELS = "/v2/repository/models"
EVENTS = "/v2/events"

PATIENCE = 60.0
"""Seconds for an answer; the daemon's comments come more often in a stream of events."""

_MAX_LINE = 1 << 20
_PIECE = 1 << 16
_RESUME, _EVENT_STREAM = "Last-Event-ID", "text/event-stream"


@dataclass(frozen=True)
class DaemonEvent:
    """One event of the stream.

    Attributes:
        name: `model`, `transition`, `progress`, `reload_failed` or `lost`.
        data: What it says.
        position: Where the stream can be gone on with after it, where that is said.
    """

    name: str
    data: dict[str, Any]
    position: str = ""


class ManagementClient:
    """Asks one daemon.

    Args:
        address: Where it is, and the token that it wants.

    Attributes:
        address: The same.

    Every method raises:
        RemoteError: (a `RuntimeError`) The daemon refused, or does not speak this protocol.
        RemoteUnavailable: (a `ConnectionError`) It can't be reached, or could not do it now.
    """

    def __init__(self, address: Address) -> None:
        self.address = address

    def models(self) -> list[dict[str, Any]]:
        """Return the state of every model that is there, or configured."""
        models: list[dict[str, Any]] = self.address.get_json(MODELS, PATIENCE)["models"]
        return models

    def model(self, model_id: str) -> dict[str, Any]:
        """Return the state of one."""
        state: dict[str, Any] = self.address.get_json(_path(model_id), PATIENCE)
        return state

    def begin(self, model_id: str, action: str, **options: Any) -> tuple[bool, dict[str, Any]]:
        """Begin to `load`, `unload` or `reload` a model.

        Returns:
            Whether there was nothing to be done, and the model's state.
        """
        body = {"wait": False, **options}
        status, state = self._post(f"{_path(model_id)}/{action}", body, PATIENCE)
        return status != HTTPStatus.ACCEPTED, state

    def finish(
        self, model_id: str, action: str, patience: float | None = None, **options: Any
    ) -> dict[str, Any]:
        """Do the same, or `cancel`, and return the model's state when it has ended."""
        return self._post(f"{_path(model_id)}/{action}", options, patience)[1]

    @contextmanager
    def events(
        self, model_id: str | None = None, after: str | None = None
    ) -> Iterator[Iterator[DaemonEvent]]:
        """Open the stream of events, which begins with the present state of every model.

        Args:
            model_id: The model to hear of, if not of all.
            after: The position of the last event that was heard: what came since begins the stream,
                if that is all there, and else word of the loss does.
        """
        query = "" if model_id is None else f"?{urlencode({'model': model_id})}"
        address = self.address
        headers = address.headers if after is None else {**address.headers, _RESUME: after}
        with closing(address.connection(PATIENCE)) as connection:
            path = f"{address.prefix}{EVENTS}{query}"
            try:
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                refusal = b"" if response.status == HTTPStatus.OK else response.read(_MAX_LINE)
            except (OSError, HTTPException) as error:
                raise address.unreachable(error) from error
            if response.status != HTTPStatus.OK:
                raise address.refusal(response.status, refusal)
            if response.headers.get_content_type() != _EVENT_STREAM:
                raise RemoteError(f"{address}{EVENTS} is no stream of events", "bad_answer")
            with response:  # it has the socket now: the daemon closes the connection at the end
                yield self._parse(response)

    def _parse(self, response: HTTPResponse) -> Iterator[DaemonEvent]:
        """Yield the events of a stream until it ends."""
        fields: dict[str, str] = {}
        try:
            for text in _lines(response):
                if text:
                    name, _, value = text.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    name, data = fields.get("event", "message"), json.loads(fields["data"])
                    yield DaemonEvent(name, data, fields.get("id", ""))
                    fields = {}
        except (OSError, HTTPException) as error:
            raise self.address.unreachable(error) from error
        except ValueError:
            raise RemoteError(f"{self.address}{EVENTS} sent no events", "bad_answer") from None

    def _post(
        self, path: str, body: dict[str, Any], patience: float | None
    ) -> tuple[int, dict[str, Any]]:
        """Send a request, and return status and answer."""
        address = self.address
        headers = {**address.headers, "Content-Type": "application/json"}
        try:
            with closing(address.connection(patience)) as connection:
                connection.request("POST", address.prefix + path, json.dumps(body), headers)
                response = connection.getresponse()
                status, answer = response.status, response.read(_MAX_LINE)
        except (OSError, HTTPException) as error:
            raise address.unreachable(error) from error
        if status not in {HTTPStatus.OK, HTTPStatus.ACCEPTED}:
            raise address.refusal(status, answer)
        try:
            state: dict[str, Any] = json.loads(answer)
        except ValueError:
            raise RemoteError(f"{address}{path} did not answer with JSON", "bad_answer") from None
        return status, state


def _lines(response: HTTPResponse) -> Iterator[str]:
    """Yield the lines of an answer as they come.

    `readline` would take a connection that was cut off for the end.

    Raises:
        HTTPException: It ends before its end.
        ValueError: One is too long, or no text.
    """
    left = bytearray()
    while piece := response.read1(_PIECE):
        left += piece
        *lines, left = left.split(b"\n")
        for line in lines:
            yield line.decode().removesuffix("\r")
        if len(left) > _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} bytes")


def _path(model_id: str) -> str:
    """Return the path of a model in the repository."""
    return f"{MODELS}/{quote(model_id, safe='')}"
