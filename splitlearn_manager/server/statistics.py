"""How a model's inference requests went: Triton's statistics extension.

    GET /v2/models/stats
    GET /v2/models/{m}[/versions/{v}]/stats

Counts go on through reloads, and begin anew with the daemon.  Requests that never got to a model
(an unknown one, one that is being loaded) are not in them; steps of sessions neither.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.routing import Route

from splitlearn_manager.server.model_metadata import MODEL_VERSION
from splitlearn_manager.server.model_path import named_model

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from splitlearn_manager.core.async_model_manager import AsyncModelManager


@dataclass(slots=True)
class Duration:
    """How often something was done, and the nanoseconds that it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count it once more."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class Durations:
    """What took how long.

    Attributes:
        success: Requests that were answered, from the request's head to the answer's first byte.
        fail: Those that were refused, failed or given up, likewise.
        queue: Of those that succeeded: waiting for the model's thread.
        compute_input: Likewise: decompressing, parsing and checking.
        compute_infer: Likewise: the forward.
        compute_output: Likewise: the outputs' bytes or JSON, and their compression.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(frozen=True, slots=True)
class Stages:
    """Nanoseconds of the stages of a request that succeeded, its rows, and its positions in all."""

    rows: int
    tokens: int
    queue: int
    compute_input: int
    compute_infer: int
    compute_output: int


@dataclass(slots=True)
class ModelStatistics:
    """The statistics of one model.

    Attributes:
        last_inference: When the last one succeeded, in milliseconds since the epoch; 0 for never.
        inference_count: Rows of the requests that succeeded: each row is an inference.
        execution_count: Forwards of those requests: one each.
        inference_stats: How long they took.
    """

    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: Durations = field(default_factory=Durations)

    def succeeded(self, ns: int, stages: Stages) -> None:
        """Count a request that was answered."""
        self.last_inference = time.time_ns() // 1_000_000
        self.inference_count += stages.rows
        self.execution_count += 1
        stats = self.inference_stats
        stats.success.add(ns)
        stats.queue.add(stages.queue)
        stats.compute_input.add(stages.compute_input)
        stats.compute_infer.add(stages.compute_infer)
        stats.compute_output.add(stages.compute_output)

    def failed(self, ns: int) -> None:
        """Count one that was not."""
        self.inference_stats.fail.add(ns)


class StatisticsRoutes:
    """The statistics of all models, and the routes that show them."""

    def __init__(self, manager: AsyncModelManager) -> None:
        self._manager = manager
        self._models: dict[str, ModelStatistics] = {}

    def of(self, model_id: str) -> ModelStatistics:
        """Return those of one model, which must be there: ids are kept."""
        return self._models.setdefault(model_id, ModelStatistics())

    def routes(self) -> list[Route]:
        """Return the routes; they must stand before that of a model's metadata."""
        model = "/v2/models/{model}"
        return [
            Route("/v2/models/stats", self.show_all, methods=["GET"]),
            Route(f"{model}/stats", self.show, methods=["GET"]),
            Route(f"{model}/versions/{{version}}/stats", self.show, methods=["GET"]),
        ]

    async def show_all(self, request: Request) -> Response:
        """Show those of every model that there is."""
        del request
        models = await self._manager.list_models()
        return JSONResponse({"model_stats": [self._entry(model.model_id) for model in models]})

    async def show(self, request: Request) -> Response:
        """Show those of one, whatever its state."""
        model = await self._manager.get_model_info(named_model(request))
        return JSONResponse({"model_stats": [self._entry(model.model_id)]})

    def _entry(self, model_id: str) -> dict[str, Any]:
        statistics = self._models.get(model_id, ModelStatistics())
        return {"name": model_id, "version": MODEL_VERSION, **asdict(statistics)}
