"""Loading and unloading over the network: Triton's model repository extension, and a little more.

    POST /v2/repository/models/{m}/load      load a model that the configuration names
    POST /v2/repository/models/{m}/unload    drain it, unload it
    POST /v2/repository/models/{m}/reload    load it anew, and swap
    POST /v2/repository/models/{m}/cancel    end a load or reload under way
    GET  /v2/repository/models[/{m}]         what state it is in

The posts need `server.management: true`.  By default they wait for the end, as clients of the
extension expect.  With `Prefer: respond-async` (RFC 7240), or `{"wait": false}`, the answer comes
at once: 202, and in `Location` where to look.  The work is the manager's in both cases: a client
that goes away ends nothing.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from splitlearn_manager.config.section import found, unknown_key
from splitlearn_manager.core.async_model_manager import ReloadPolicy
from splitlearn_manager.core.entries import FailedEntry
from splitlearn_manager.errors import ModelNotFoundError
from splitlearn_manager.server.model_state import absent, as_json, snapshot
from splitlearn_manager.server.request_body import json_object
from splitlearn_manager.server.waiting import SHUTTING_DOWN, wait_for_client

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from starlette.requests import Request

    from splitlearn_manager.config import ModelConfig
    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel, LoadingPlaceholder
    from splitlearn_manager.server.catalogue import Catalogue

PATH = "/v2/repository/models"

LONGEST_DRAIN = 24 * 3600.0
"""Seconds that a request may give to a drain: more is a mistake, not a wish."""

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this status: it is for the metrics."""

_NOT_FROM_REQUESTS = ("config", "file:")


@dataclass(frozen=True)
class Order:
    """What a request asks for, beside the model.

    Attributes:
        wait: Whether the answer comes at the end.
        preferred: Whether that was asked for by header, which the answer then says.
        options: The rest of the body, its `parameters` included.
    """

    wait: bool
    preferred: bool
    options: dict[str, Any] = field(default_factory=dict)


class ManagementRoutes:
    """The routes, over one manager.

    Args:
        manager: Whose models they are.
        catalogue: Those that requests may name.
        enabled: Whether requests may change anything.
        stopping: Set when the daemon begins to shut down.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        catalogue: Catalogue,
        *,
        enabled: bool,
        stopping: asyncio.Event,
    ) -> None:
        self._manager = manager
        self._catalogue = catalogue
        self._enabled = enabled
        self._stopping = stopping

    def routes(self) -> list[Route]:
        """Return the routes, each with its methods."""
        model = PATH + "/{model}"
        return [
            Route(PATH, self.show_all, methods=["GET"]),
            Route(model, self.show, methods=["GET"]),
            Route(f"{model}/load", self.load, methods=["POST"]),
            Route(f"{model}/unload", self.unload, methods=["POST"]),
            Route(f"{model}/reload", self.reload, methods=["POST"]),
            Route(f"{model}/cancel", self.cancel, methods=["POST"]),
        ]

    # --- Looking ---------------------------------------------------------------------------

    async def show_all(self, request: Request) -> Response:
        """List every model that is there, or configured."""
        del request
        return JSONResponse({"models": await snapshot(self._manager, self._catalogue)})

    async def show(self, request: Request) -> Response:
        """Show one."""
        return JSONResponse(await self._state(request.path_params["model"]))

    async def _state(self, model_id: str) -> dict[str, Any]:
        """Return a model's state.

        Raises:
            ModelNotFoundError: It is neither there nor configured.
        """
        try:
            return as_json(await self._manager.get_model_info(model_id))
        except ModelNotFoundError:
            self._catalogue.config(model_id)
            return absent(model_id)

    # --- Changing --------------------------------------------------------------------------

    async def load(self, request: Request) -> Response:
        """Load a model, or join its load; one that is ready is left as it is."""
        config = self._admit(request)
        order = await _order(request)
        load = await self._manager.start_ensure(config)
        if load is None:
            return JSONResponse(await self._state(config.model_id))
        return await self._finish(request, config, order, _loaded(load))

    async def unload(self, request: Request) -> Response:
        """Unload a model; one that is not there is unloaded already."""
        config = self._admit(request)
        order = await _order(request, "drain_timeout", "unload_dependents")
        seconds = _drain_timeout(order.options.get("drain_timeout"))
        try:
            going = await self._manager.start_unload(config.model_id, seconds)
        except ModelNotFoundError:
            going = None
        if going is None:
            return JSONResponse(await self._state(config.model_id))
        return await self._finish(request, config, order, _unloaded(going))

    async def reload(self, request: Request) -> Response:
        """Load a model anew, from what the configuration says now."""
        config = self._admit(request)
        order = await _order(request, "policy")
        policy = order.options.get("policy", config.reload)
        if policy not in list(ReloadPolicy):
            raise HTTPException(
                400, f'"policy" must be {" or ".join(ReloadPolicy)}, {found(policy)}'
            )
        begun = await self._manager.start_reload(config, policy)
        return await self._finish(request, config, order, _reloaded(begun))

    async def cancel(self, request: Request) -> Response:
        """End a load or reload under way; says whether its thread has ended, too."""
        config = self._admit(request)
        await _order(request)
        ended = await self._manager.cancel_load(config.model_id)
        state = await self._state(config.model_id)
        return JSONResponse(state | {"thread_ended": ended})

    def _admit(self, request: Request) -> ModelConfig:
        """Return the configuration of the model that a request names, if it may change it.

        Raises:
            HTTPException: 403 where the network may change nothing, 503 at the end.
            ModelNotFoundError: The configuration has no such model.
        """
        if not self._enabled:
            raise HTTPException(
                403,
                "models can't be changed over the network: set server.management to true in the"
                " daemon's configuration to allow it",
            )
        if self._stopping.is_set():
            raise HTTPException(503, SHUTTING_DOWN)
        return self._catalogue.config(request.path_params["model"])

    async def _finish(
        self,
        request: Request,
        config: ModelConfig,
        order: Order,
        work: Coroutine[Any, Any, dict[str, Any]],
    ) -> Response:
        """Answer at once, or when the work has ended."""
        model_id = config.model_id
        if not order.wait:
            work.close()  # it only waits
            headers = {"Location": f"{PATH}/{model_id}"}
            if order.preferred:
                headers["Preference-Applied"] = "respond-async"
            return JSONResponse(await self._state(model_id), status_code=202, headers=headers)
        waiting = asyncio.ensure_future(work)
        result = await wait_for_client(waiting, request.receive, self._stopping)
        if result is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(await self._state(model_id) | result)


async def _loaded(load: LoadingPlaceholder) -> dict[str, Any]:
    """Wait for the end of a load, and raise if it failed."""
    outcome = await load.outcome()
    if isinstance(outcome, FailedEntry):
        raise outcome.load_error()
    return {}


async def _reloaded(begun: asyncio.Future[LoadingPlaceholder]) -> dict[str, Any]:
    """Wait for the end of a reload."""
    return await _loaded(await asyncio.shield(begun))


async def _unloaded(going: AsyncManagedModel) -> dict[str, Any]:
    """Wait for the end of an unload, and say what of its memory is not back."""
    await going.gone()
    return {"unreturned_bytes": going.unreturned_bytes}


async def _order(request: Request, *known: str) -> Order:
    """Return what a request asks for.

    Raises:
        HTTPException: 400 where the body has what no request may say, or nobody knows.
    """
    body = await json_object(request)
    wait = body.pop("wait", True)
    if not isinstance(wait, bool):
        raise HTTPException(400, f'"wait" must be true or false, {found(wait)}')
    parameters = body.pop("parameters", {})
    if not isinstance(parameters, dict):
        raise HTTPException(400, f'"parameters" must be an object, {found(parameters)}')
    options = body | parameters
    for key in options:
        _check_key(key, known)
    preferred = _prefers_async(request)
    return Order(wait and not preferred, preferred, options)


def _check_key(key: str, known: tuple[str, ...]) -> None:
    """Refuse a key that no request may have, saying why."""
    if key.startswith(_NOT_FROM_REQUESTS):
        raise HTTPException(
            400,
            f"{found(key)}: what a model is loaded from is in the daemon's configuration, and can't"
            " be given in a request",
        )
    if key not in known:
        raise HTTPException(400, f"{found(key)}: {unknown_key(key, ('wait', *known))}")


def _prefers_async(request: Request) -> bool:
    """Whether a request has the preference `respond-async`."""
    given = ",".join(request.headers.getlist("prefer")).split(",")
    return any(item.partition(";")[0].strip().lower() == "respond-async" for item in given)


def _drain_timeout(value: Any) -> float | None:
    """Return the seconds that a request gives to a drain, if it says so.

    Raises:
        HTTPException: 400 where they are none.
    """
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not 0 <= value <= LONGEST_DRAIN:
        message = f'"drain_timeout" must be 0 to {LONGEST_DRAIN:.0f} seconds, {found(value)}'
        raise HTTPException(400, message)
    return float(value)
