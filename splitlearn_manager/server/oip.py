"""The Open Inference Protocol v2: health, metadata, configuration, repository index.

Inference is in `infer.py`, statistics in `statistics.py`.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md, and
for the index Triton's model repository extension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse
from starlette.routing import Route

from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.observability import version
from splitlearn_manager.server.model_metadata import MODEL_VERSION, describe, describe_config
from splitlearn_manager.server.model_path import named_model, ready_model
from splitlearn_manager.server.model_state import NOT_LOADED, as_json, reason_of
from splitlearn_manager.server.request_body import json_object
from splitlearn_manager.server.responses import error_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.model_info import ModelInfo
    from splitlearn_manager.server.catalogue import Catalogue
    from splitlearn_manager.server.readiness import Readiness

EXTENSIONS = (
    "binary_tensor_data",
    "statistics",
    "model_configuration",
    "splitlearn_sessions",
)

LIVE_PATIENCE = 0.8
"""Seconds for the manager to show that it can decide things: less than probes wait, by default."""

_INDEX_STATES = {
    ModelStatus.LOADING: "LOADING",
    ModelStatus.READY: "READY",
    ModelStatus.UNLOADING: "UNLOADING",
    ModelStatus.FAILED: "UNAVAILABLE",
}


class OpenInferenceRoutes:
    """The routes, over one manager.

    Args:
        manager: Whose models are served.
        readiness: What the readiness probe is told.
        catalogue: What is configured, and so in the index, whether it is loaded or not.
        extensions: What else of the protocol there is.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        readiness: Readiness,
        catalogue: Catalogue,
        extensions: tuple[str, ...] = (),
    ) -> None:
        self._manager = manager
        self._readiness = readiness
        self._catalogue = catalogue
        self._extensions = [*EXTENSIONS, *extensions]

    def routes(self) -> list[Route]:
        """Return the routes, each with its methods."""
        model = "/v2/models/{model}"
        versioned = model + "/versions/{version}"
        return [
            Route("/v2", self.server_metadata, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
            Route(model, self.model_metadata, methods=["GET"]),
            Route(f"{model}/ready", self.model_ready, methods=["GET"]),
            Route(f"{model}/config", self.model_config, methods=["GET"]),
            Route(versioned, self.model_metadata, methods=["GET"]),
            Route(f"{versioned}/ready", self.model_ready, methods=["GET"]),
            Route(f"{versioned}/config", self.model_config, methods=["GET"]),
            Route("/v2/repository/index", self.repository_index, methods=["POST"]),
        ]

    async def live(self, request: Request) -> Response:
        """Answer as long as the manager can decide things, whatever its models do."""
        del request
        try:
            await self._manager.check_alive(LIVE_PATIENCE)
        except TimeoutError:
            message = f"the manager has decided nothing for {LIVE_PATIENCE:g} s; it is stuck"
            return JSONResponse({"live": False, "error": message}, status_code=503)
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Say whether to send work here; 503 and the reason if not."""
        del request
        problem = await self._readiness.problem()
        if problem is None:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "error": problem}, status_code=503)

    async def server_metadata(self, request: Request) -> Response:
        """Say who this is."""
        del request
        return JSONResponse(
            {"name": "splitlearn", "version": version(), "extensions": self._extensions}
        )

    async def model_metadata(self, request: Request) -> Response:
        """Say what a model takes and gives."""
        model_id = named_model(request)
        managed = await ready_model(self._manager, model_id, self._readiness.awaited)
        return JSONResponse(describe(model_id, managed.model))

    async def model_config(self, request: Request) -> Response:
        """Say the same as Triton's configuration of a model does."""
        model_id = named_model(request)
        managed = await ready_model(self._manager, model_id, self._readiness.awaited)
        return JSONResponse(describe_config(model_id, managed.model))

    async def model_ready(self, request: Request) -> Response:
        """Say whether a model can be used; 503 and the reason if not."""
        model = await self._manager.get_model_info(named_model(request))
        if model.status is ModelStatus.READY:
            return JSONResponse({"name": model.model_id, "ready": True})
        body = {"name": model.model_id, "ready": False, "error": reason_of(model)}
        return JSONResponse(body, status_code=503)

    async def repository_index(self, request: Request) -> Response:
        """List every model with its state, or with `{"ready": true}` those that can be used."""
        body = await json_object(request)
        only_ready = body.get("ready", False)
        if not isinstance(only_ready, bool):
            return error_response(
                request.scope["path"], 400, f'"ready" must be true or false, found {only_ready!r}'
            )
        models = {model.model_id: model for model in await self._manager.list_models()}
        entries = list(map(_index_entry, models.values()))
        entries += [_not_loaded(name) for name in self._catalogue.models if name not in models]
        return JSONResponse(
            [entry for entry in entries if not only_ready or entry["state"] == "READY"]
        )


def _index_entry(model: ModelInfo) -> dict[str, str]:
    """Return a model as the index lists it: the reason is free text for people."""
    return {
        "name": model.model_id,
        "version": MODEL_VERSION,
        "state": _INDEX_STATES[model.status],
        "reason": as_json(model)["reason"],
    }


def _not_loaded(model_id: str) -> dict[str, str]:
    """Return a model that is configured, and not there."""
    return {
        "name": model_id,
        "version": MODEL_VERSION,
        "state": "UNAVAILABLE",
        "reason": NOT_LOADED,
    }
