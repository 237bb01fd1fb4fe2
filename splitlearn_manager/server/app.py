"""The daemon's HTTP application: its routes, and what every request passes."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from splitlearn_manager.core.resources import pool_of
from splitlearn_manager.errors import ManagerError
from splitlearn_manager.server.event_stream import EventRoutes
from splitlearn_manager.server.infer import InferRoutes
from splitlearn_manager.server.management import ManagementRoutes
from splitlearn_manager.server.oip import OpenInferenceRoutes
from splitlearn_manager.server.openai_routes import OpenAIRoutes
from splitlearn_manager.server.request_context import REQUEST_ID, RequestContextMiddleware
from splitlearn_manager.server.responses import error_response, manager_error_response
from splitlearn_manager.server.security import AccessPolicy, SecurityMiddleware
from splitlearn_manager.server.statistics import StatisticsRoutes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.generation.engine import Engines
    from splitlearn_manager.observability import Metrics
    from splitlearn_manager.server.access_log import AccessLog
    from splitlearn_manager.server.catalogue import Catalogue
    from splitlearn_manager.server.places import Shares
    from splitlearn_manager.server.readiness import Readiness
    from splitlearn_manager.server.sessions_ws import SessionEndpoint
    from splitlearn_manager.tracing import Tracing

logger = logging.getLogger(__name__)


def build_app(
    manager: AsyncModelManager,
    *,
    policy: AccessPolicy,
    sessions: SessionEndpoint,
    engines: Engines,
    readiness: Readiness,
    metrics: Metrics,
    catalogue: Catalogue,
    management: bool,
    stopping: asyncio.Event,
    max_body_bytes: int,
    max_queue_size: int,
    max_rows: int,
    shares: Shares | None = None,
    access_log: AccessLog | None = None,
    tracing: Tracing | None = None,
) -> Starlette:
    """Return the application, which any ASGI server can run.

    Args:
        manager: Whose models are served.
        policy: What a request has to show.
        sessions: The endpoint of sessions.
        engines: Who generates text.
        readiness: What the readiness probe is told.
        metrics: Where requests are counted, and what `/metrics` shows.
        catalogue: The models that requests may name.
        management: Whether requests may load and unload them.
        stopping: Set when the daemon begins to shut down: whoever waits then waits no longer.
        max_body_bytes: Longest body of an inference request.
        max_queue_size: Most inference requests of one model at once.
        max_rows: Most answers to one prompt that are generated at once.
        shares: Most of one client.
        access_log: Where requests are logged, if they are.
        tracing: Where they are spans, if they are.
    """
    extensions = ("model_repository(unload_dependents)",) if management else ()
    managing = ManagementRoutes(manager, catalogue, enabled=management, stopping=stopping)
    statistics = StatisticsRoutes(manager)
    inference = InferRoutes(
        manager,
        statistics,
        metrics,
        stopping,
        max_body_bytes=max_body_bytes,
        max_queue_size=max_queue_size,
        shares=shares,
        tracing=tracing,
    )
    openai = OpenAIRoutes(
        manager,
        engines,
        catalogue,
        metrics,
        stopping,
        max_body_bytes=max_body_bytes,
        max_queue_size=max_queue_size,
        max_rows=max_rows,
        shares=shares,
    )
    app = Starlette(
        routes=[
            *statistics.routes(),
            *inference.routes(),
            *openai.routes(),
            *OpenInferenceRoutes(manager, readiness, catalogue, extensions).routes(),
            *managing.routes(),
            *EventRoutes(manager, catalogue, stopping).routes(),
            *sessions.routes(),
            Route("/metrics", _metrics_route(manager, sessions, engines, metrics), methods=["GET"]),
        ],
        middleware=[
            Middleware(
                RequestContextMiddleware, metrics=metrics, access_log=access_log, tracing=tracing
            ),
            Middleware(SecurityMiddleware, policy=policy),
        ],
        exception_handlers={
            HTTPException: _http_error,
            ManagerError: _manager_error,
            Exception: _unexpected_error,
        },
    )
    app.router.redirect_slashes = False  # one path for one thing
    app.router.default = _not_found
    return app


def _metrics_route(
    manager: AsyncModelManager, sessions: SessionEndpoint, engines: Engines, metrics: Metrics
) -> Callable[[Request], Awaitable[Response]]:
    turn = asyncio.Lock()

    async def show(request: Request) -> Response:
        """Show the metrics, with states and memory as they are now; to one after the other.

        What is set from snapshots must not change while it is written for somebody else.
        """
        del request
        async with turn:
            return Response(await text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def text() -> bytes:
        models = await manager.list_models()
        metrics.observe_models(models)
        for device in manager.resource_manager.devices():
            used = sum(m.resident_bytes for m in models if pool_of(m.device) == device)
            usage = await asyncio.to_thread(manager.resource_manager.get_current_usage, device)
            caches = sessions.reserved_on(device) + engines.memory.nbytes_on(device)
            metrics.observe_memory(usage, used, caches)
        return await asyncio.to_thread(metrics.render)  # caches are measured for it

    return show


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a path that nothing here has, for requests and WebSockets alike."""
    del receive, send
    raise HTTPException(404, f"there is nothing at {scope['path']}")


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer an error of the routing: an unknown path, a wrong method, a bad body."""
    if not isinstance(error, HTTPException):
        raise error
    return error_response(request.scope["path"], error.status_code, error.detail, error.headers)


async def _manager_error(request: Request, error: Exception) -> Response:
    """Answer an error of ours as it asks to be answered."""
    if not isinstance(error, ManagerError):
        raise error
    return manager_error_response(request.scope["path"], error)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Answer a bug: details are for the log, under the id that the client gets."""
    request_id = request.scope["state"]["request_id"]
    named = {"request_id": request_id}
    logger.error("request %s failed: %r", request_id, error, extra=named)
    message = f"internal error; the log has it as request {request_id}"
    return error_response(request.scope["path"], 500, message, {REQUEST_ID: request_id})
