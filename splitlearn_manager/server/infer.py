"""Inference: `POST /v2/models/{m}[/versions/{v}]/infer`, in JSON and in binary.

What a request may cost is bounded, and one that can't be taken on is told so at once:

- A model has `server.max_queue_size` places.  A request takes one before its body is read, and has
  it until its answer has been sent.  Where none is free, it is answered with 429 and
  `Retry-After: 1`, without its body being read; nothing ever waits for a place.
- A client may have `server.max_infer_per_client` of them, of all models, if that is set; one more
  is answered likewise.
- A body has `server.max_frame_bytes`, as it comes and as it is when decompressed (413), and must
  come at a pace (408).  An answer must be taken at the same pace, or the connection is dropped.
- A model that is being loaded, is being unloaded or has failed is 503, with `Retry-After` where
  asking again helps; so is everything new once the daemon shuts down.

Requests of a model run one after the other in its own thread, in the order in which they were
read, between the forwards of its sessions.  A client that goes away before its turn has nothing
run for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from starlette.requests import ClientDisconnect
from starlette.responses import Response as EmptyResponse
from starlette.routing import Route

from splitlearn_manager.errors import ManagerError
from splitlearn_manager.server.answering import Response, send_answer
from splitlearn_manager.server.management import CLIENT_CLOSED_REQUEST
from splitlearn_manager.server.model_metadata import MODEL_VERSION
from splitlearn_manager.server.model_path import named_model, ready_model
from splitlearn_manager.server.places import Places, Shares
from splitlearn_manager.server.request_body import whole_body
from splitlearn_manager.server.security import CLIENT
from splitlearn_manager.server.statistics import Stages
from splitlearn_manager.server.waiting import SHUTTING_DOWN, unless_gone
from splitlearn_manager.serving.content_coding import (
    coding_of,
    compress,
    decompress,
    wanted_coding,
)
from splitlearn_manager.serving.infer_errors import InferFailedError, ShuttingDownError
from splitlearn_manager.serving.infer_wire import (
    HEADER_LENGTH,
    InferRequest,
    json_length_of,
    read_request,
    write_answer,
)
from splitlearn_manager.serving.long_json import SHORT
from splitlearn_manager.serving.signature import Job, Signature
from splitlearn_manager.trace_context import in_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.observability import Metrics
    from splitlearn_manager.server.statistics import StatisticsRoutes
    from splitlearn_manager.serving.inference import Result
    from splitlearn_manager.tracing import Tracing

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

CODERS = 2
"""Threads that read and write JSON, and compress: each may hold a body and its elements."""

OK, CANCELLED = "ok", "cancelled"

PROTOCOL = "infer"
"""What these bytes are called in the metrics."""


class InferRoutes:
    """The routes, over one manager.

    Args:
        manager: Whose models answer.
        statistics: Where requests are counted, for clients.
        metrics: Likewise, for operators.
        stopping: Set when the daemon begins to shut down.
        max_body_bytes: Longest body, as it comes and decompressed; also the longest output that is
            written as JSON, in bytes of its tensor.
        max_queue_size: Most requests of one model at once.
        shares: Most of one client.
        tracing: Who makes spans of them, if anybody does.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        statistics: StatisticsRoutes,
        metrics: Metrics,
        stopping: asyncio.Event,
        *,
        max_body_bytes: int,
        max_queue_size: int,
        shares: Shares | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._manager = manager
        self._statistics = statistics
        self._metrics = metrics
        self._stopping = stopping
        self._limit = max_body_bytes
        self._coders = asyncio.Semaphore(CODERS)
        self._signatures: WeakKeyDictionary[AsyncManagedModel, Signature] = WeakKeyDictionary()
        self.places = Places(max_queue_size, shares)
        metrics.follow_requests(self.places.taken)

    def routes(self) -> list[Route]:
        """Return the routes."""
        model = "/v2/models/{model}"
        return [
            Route(f"{model}/infer", self.infer, methods=["POST"]),
            Route(f"{model}/versions/{{version}}/infer", self.infer, methods=["POST"]),
        ]

    async def infer(self, request: Request) -> Any:
        """Return the answer to a request, as a response that makes it.

        Raises:
            ShuttingDownError: The daemon shuts down.
            ManagerError: The model is not there, or not ready.
        """
        model_id = named_model(request)
        if self._stopping.is_set():
            raise ShuttingDownError(SHUTTING_DOWN)
        await ready_model(self._manager, model_id)
        return partial(self._serve, request, model_id)

    async def _serve(
        self, request: Request, model_id: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request, in a place of its own.

        Raises:
            ManagerError: It was refused, or failed; nothing has been sent.
        """
        del receive  # the request has it
        exchange = _Exchange(request, model_id)
        client = getattr(request.state, CLIENT, "")
        with self._counted(exchange), self.places.take(model_id, client):
            answer = await self._answer(exchange)
            if answer is None:
                self._count(exchange, CANCELLED)
                await _nobody_there(scope, request.receive, send)
            else:
                self._count(exchange, OK)
                await send_answer(answer, scope, send)
                self._metrics.sent(model_id, PROTOCOL, answer.length)

    @contextmanager
    def _counted(self, exchange: _Exchange) -> Iterator[None]:
        """Count a request that ends in an error."""
        try:
            yield
        except ManagerError as error:
            self._count(exchange, error.code)
            raise
        except asyncio.CancelledError:
            self._count(exchange, CANCELLED)
            raise
        except Exception:
            self._count(exchange, InferFailedError.code)
            raise

    def _count(self, exchange: _Exchange, code: str) -> None:
        """Count a request by what has become of it; what happens to its answer is not counted."""
        if exchange.counted:
            return
        exchange.counted = True
        self._metrics.inference(exchange.model_id, code)
        if exchange.stages is not None and code == OK:
            self._succeeded(exchange.model_id, exchange.age(), exchange.stages)
        else:
            self._statistics.of(exchange.model_id).failed(exchange.age())

    def _succeeded(self, model_id: str, age: int, stages: Stages) -> None:
        """Count how long a request took, in nanoseconds here and in seconds for the metrics."""
        self._statistics.of(model_id).succeeded(age, stages)
        seconds = (age / 1e9, stages.queue / 1e9, stages.compute_infer / 1e9)
        self._metrics.inferred(model_id, stages.tokens, *seconds)

    async def _answer(self, exchange: _Exchange) -> Response | None:
        """Return the answer to a request; `None` if the client goes away before there is one."""
        try:
            body = await whole_body(exchange.request, self._limit)
        except ClientDisconnect:
            return None
        self._metrics.received(exchange.model_id, PROTOCOL, len(body))
        work = asyncio.create_task(self._work(exchange, body))
        del body
        return await unless_gone(work, exchange.request.receive)

    async def _work(self, exchange: _Exchange, body: bytearray) -> Response:
        """Read, run and answer a request whose body is here."""
        headers, begun = exchange.request.headers, time.perf_counter_ns()
        encoding = coding_of(headers.get("content-encoding"))
        length = headers.get(HEADER_LENGTH)
        short = encoding is None and _json_bytes(length, len(body)) <= SHORT
        request = await self._code(short, _read, body, encoding, length, self._limit)
        read, answering = time.perf_counter_ns(), wanted_coding(headers.get("accept-encoding"))
        async with self._manager.use(exchange.model_id) as managed:
            job = self._signature(managed).job(request, most_json_bytes=self._limit)
            queued = time.perf_counter_ns()
            result = await self._run(managed, job, exchange)
            if self._tracing is not None:
                queue = result.began - queued
                self._tracing.inferred(job.tokens, queue, result.infer_ns, result.began)
        done, short = time.perf_counter_ns(), answering is None and _is_short(result)
        response = await self._code(short, _write, exchange.model_id, request.id, result, answering)
        exchange.stages = Stages(
            rows=job.batch,
            tokens=job.tokens,
            queue=result.began - queued,
            compute_input=read - begun + result.input_ns,
            compute_infer=result.infer_ns,
            compute_output=result.output_ns + time.perf_counter_ns() - done,
        )
        return response

    def _signature(self, managed: AsyncManagedModel) -> Signature:
        """Return what a model takes, which takes a look at each of its weights."""
        known = self._signatures.get(managed)
        if known is None:
            known = self._signatures[managed] = Signature.of(managed.model)
        return known

    async def _code(
        self, short: bool, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Read or write something: at once if it is short, or else in a thread."""
        if short:
            return fn(*args, **kwargs)
        async with self._coders:
            return await asyncio.to_thread(fn, *args, **kwargs)

    async def _run(self, managed: AsyncManagedModel, job: Job, exchange: _Exchange) -> Result:
        """Run a request in the model's thread, when its turn comes.

        Raises:
            InferFailedError: The forward failed.
            ManagerError: Its inputs have values that the model has not, or the model is gone.
        """
        from splitlearn_manager.serving.inference import run_job  # noqa: PLC0415 - it needs torch

        try:
            return await managed.run(in_context(run_job), managed, job)
        except ManagerError:
            raise
        except Exception:
            logger.exception("a request to model %s failed", exchange.model_id)
        # Out here, so that the error of the forward, whose frames have the model, is let go.
        request_id = exchange.request.scope["state"]["request_id"]
        raise InferFailedError(f"the forward failed; the log has it as request {request_id}")


@dataclass(slots=True)
class _Exchange:
    """A request on its way: whose it is, and what has become of it."""

    request: Request
    model_id: str
    started: int = field(default_factory=time.perf_counter_ns)
    counted: bool = False
    stages: Stages | None = None

    def age(self) -> int:
        """Return the nanoseconds since it came."""
        return time.perf_counter_ns() - self.started


def _json_bytes(header: str | None, total: int) -> int:
    """Return how many bytes of a body are JSON, if its header is right."""
    digits = (header or "").strip()
    good = digits.isascii() and digits.isdigit() and len(digits) < len(str(total)) + 1
    return min(total, int(digits)) if good else total


def _read(body: bytearray, encoding: str | None, header: str | None, limit: int) -> InferRequest:
    """Return the request that a body is, as it came."""
    whole = body if encoding is None else decompress(body, encoding, limit)
    return read_request(whole, json_length_of(header, len(whole)))


def _is_short(result: Result) -> bool:
    """Whether the JSON of an answer is soon written."""
    return sum(one.data.nbytes for one in result.outputs if not one.binary) <= SHORT


def _write(model_id: str, request_id: str | None, result: Result, encoding: str | None) -> Response:
    """Return the answer, as it is to be sent."""
    answer = write_answer(model_id, MODEL_VERSION, request_id, result.outputs)
    binary = answer.json_length is not None
    headers = {"Content-Type": "application/octet-stream" if binary else "application/json"}
    if binary:
        headers[HEADER_LENGTH] = str(answer.json_length)
    pieces: Sequence[bytes | memoryview] = answer.pieces
    if encoding is not None:
        headers["Content-Encoding"] = encoding
        pieces = list(compress(pieces, encoding))
    return Response(headers, pieces)


async def _nobody_there(scope: Scope, receive: Receive, send: Send) -> None:
    """End a request whose client has gone: the status is for the metrics alone."""
    await EmptyResponse(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
