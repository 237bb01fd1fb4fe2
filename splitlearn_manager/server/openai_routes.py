"""OpenAI's protocol: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

Whole models and pipelines answer; the text that comes and goes stays on this machine, where a
pipeline's tokenizer, Bottom and Top are.

What a request may cost is bounded: its body as in `infer`, its answers by the model's context and
the memory for caches, and as many requests as `server.max_queue_size` wait for each model (429).
A client that goes away has nothing more generated.  While a model is being loaded, 503 with
`Retry-After` has clients ask again; what can't help to ask again says `x-should-retry: false`.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.responses import Response as EmptyResponse
from starlette.routing import Route

from splitlearn_manager.errors import ManagerError, ModelNotFoundError
from splitlearn_manager.generation.errors import NotLoadedError
from splitlearn_manager.generation.jobs import Failed, NothingMade, PromptTold
from splitlearn_manager.generation.planning import plan
from splitlearn_manager.generation.requests import read_body, read_chat, read_completion
from splitlearn_manager.generation.text import is_generative, load_text_model
from splitlearn_manager.server.event_lines import EventLines
from splitlearn_manager.server.management import CLIENT_CLOSED_REQUEST
from splitlearn_manager.server.model_path import ready_model
from splitlearn_manager.server.openai_answers import (
    DONE,
    PING,
    Form,
    event,
    manager_error_object,
    model_object,
    usage_of,
)
from splitlearn_manager.server.places import Places
from splitlearn_manager.server.request_body import whole_body
from splitlearn_manager.server.security import CLIENT
from splitlearn_manager.server.waiting import SHUTTING_DOWN, unless_gone
from splitlearn_manager.serving.infer_errors import ShuttingDownError
from splitlearn_manager.serving.long_json import SHORT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.generation.answers import Answer, Piece
    from splitlearn_manager.generation.engine import Engine, Engines
    from splitlearn_manager.generation.jobs import Event, Job
    from splitlearn_manager.generation.planning import Plan
    from splitlearn_manager.generation.requests import Request
    from splitlearn_manager.generation.text import TextModel
    from splitlearn_manager.observability import Metrics
    from splitlearn_manager.server.catalogue import Catalogue
    from splitlearn_manager.server.places import Shares

KEEP_ALIVE = 15.0
"""Seconds without a token after which a stream has a comment, so that nobody takes it for dead."""

PROTOCOL = "openai"
"""What these bytes are called in the metrics."""

OK, CANCELLED = "ok", "cancelled"
SHORT_TEXT = 4096
"""Characters up to which a text is soon turned into tokens."""


class OpenAIRoutes:
    """The routes, over one manager.

    Args:
        manager: Whose models answer.
        engines: Who generates.
        catalogue: What is configured.
        metrics: Where requests are counted.
        stopping: Set when the daemon begins to shut down.
        max_body_bytes: Longest body.
        max_queue_size: Most bodies that are read at once.
        max_rows: Most answers of one prompt.
        shares: Most requests of one client at once.
    """

    def __init__(
        self,
        manager: AsyncModelManager,
        engines: Engines,
        catalogue: Catalogue,
        metrics: Metrics,
        stopping: asyncio.Event,
        *,
        max_body_bytes: int,
        max_queue_size: int,
        max_rows: int,
        shares: Shares | None = None,
    ) -> None:
        self._manager = manager
        self._engines = engines
        self._catalogue = catalogue
        self._metrics = metrics
        self._stopping = stopping
        self._limit = max_body_bytes
        self._max_rows = max_rows
        self._reading = Places(max_queue_size)
        self._clients = Places(sys.maxsize, shares)
        self._texts = Texts()
        self._started = int(time.time())
        metrics.follow_generation(engines.usage)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
        ]

    # --- Models ----------------------------------------------------------------------------

    async def models(self, request: HttpRequest) -> Response:
        """List the models that answer, or will when they are loaded."""
        del request
        known = await self._known()
        return JSONResponse({"object": "list", "data": list(known.values())})

    async def model(self, request: HttpRequest) -> Response:
        """Return one of them.

        Raises:
            ModelNotFoundError: There is no such model.
        """
        wanted = request.path_params["model"]
        known = await self._known()
        if wanted not in known:
            raise _not_found(wanted, known)
        return JSONResponse(known[wanted])

    async def _known(self) -> dict[str, dict[str, Any]]:
        """Return the models that answer with text, by id, in the configuration's order."""
        configs = self._catalogue.models
        loaded = {model.model_id: model for model in await self._manager.list_models()}
        known: dict[str, dict[str, Any]] = {}
        for model_id in [*configs, *(name for name in loaded if name not in configs)]:
            managed = await self._ready(model_id) if model_id in loaded else None
            config = configs.get(model_id) if managed is None else managed.config
            if config is not None and is_generative(config):
                created = self._started if managed is None else int(managed.loaded_at)
                length = None if managed is None else managed.model.max_positions
                known[model_id] = model_object(model_id, created, length)
        return known

    async def _ready(self, model_id: str) -> AsyncManagedModel | None:
        """Return a model that can be used now, or `None`."""
        try:
            return await self._manager.get_model(model_id)
        except ManagerError:
            return None

    # --- Requests --------------------------------------------------------------------------

    async def completions(self, request: HttpRequest) -> Any:
        """Return the answer to a request, as a response that makes it."""
        return self._answering(request, read_completion)

    async def chat_completions(self, request: HttpRequest) -> Any:
        """Return the answer in a chat, as a response that makes it."""
        return self._answering(request, read_chat)

    def _answering(
        self, request: HttpRequest, read: Callable[[dict[str, Any]], Request]
    ) -> Callable[..., Any]:
        if self._stopping.is_set():
            raise ShuttingDownError(SHUTTING_DOWN)
        return partial(self._serve, request, read)

    async def _serve(
        self,
        http: HttpRequest,
        read: Callable[[dict[str, Any]], Request],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer a request; `receive` is the request's.

        Raises:
            ManagerError: It was refused, or failed; nothing has been sent.
        """
        del receive
        with self._clients.take(PROTOCOL, _client_of(http)):
            await self._answer(http, read, scope, send)

    async def _answer(
        self,
        http: HttpRequest,
        read: Callable[[dict[str, Any]], Request],
        scope: Scope,
        send: Send,
    ) -> None:
        try:
            request, nbytes = await self._read(http, read)
        except ClientDisconnect:
            await _nobody_there(scope, http.receive, send)
            return
        await self._check_model(request.model)
        scope["path_params"] = {**scope.get("path_params", {}), "model": request.model}
        self._metrics.received(request.model, PROTOCOL, nbytes)
        form = Form(
            request.is_chat,
            f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            int(time.time()),
            request.model,
            include_usage=request.include_usage,
        )
        with self._counted(request.model) as done:
            if request.stream:
                lines = EventLines(scope, http.receive, send)
                work = asyncio.create_task(self._stream(request, form, lines))
                done(await unless_gone(work, http.receive) or CANCELLED)
                self._metrics.sent(request.model, PROTOCOL, lines.sent)
                return
            whole = asyncio.create_task(self._whole(request, form))
            answer = await unless_gone(whole, http.receive)
            done(CANCELLED if answer is None else OK)
        if answer is None:
            await _nobody_there(scope, http.receive, send)
            return
        response = JSONResponse(answer)
        self._metrics.sent(request.model, PROTOCOL, len(response.body))
        await response(scope, http.receive, send)

    @contextmanager
    def _counted(self, model_id: str) -> Iterator[Callable[[str], None]]:
        """Count a request by what has become of it."""
        code = CANCELLED

        def done(found: str) -> None:
            nonlocal code
            code = found

        try:
            yield done
        except ManagerError as error:
            code = error.code
            raise
        except Exception:
            code = "internal"
            raise
        finally:
            self._metrics.generation_request(model_id, code)

    async def _read(
        self, http: HttpRequest, read: Callable[[dict[str, Any]], Request]
    ) -> tuple[Request, int]:
        """Return what is asked for, and how long the body was."""
        with self._reading.take(PROTOCOL, _client_of(http)):
            body = await whole_body(http, self._limit)
        if len(body) <= SHORT:
            return read(read_body(body)), len(body)
        return await asyncio.to_thread(lambda: read(read_body(body))), len(body)

    async def _check_model(self, model_id: str) -> None:
        """Refuse a model that is not there, or not ready.

        Raises:
            ModelNotFoundError: There is none, or it is not loaded.
            ManagerError: It can't be used now, or failed to load.
        """
        try:
            await ready_model(self._manager, model_id)
        except ModelNotFoundError:
            if model_id in self._catalogue.models:
                message = f"model {model_id!r} is not loaded: splitlearn models load {model_id}"
                raise NotLoadedError(message) from None
            raise _not_found(model_id, await self._known()) from None

    # --- Answers ---------------------------------------------------------------------------

    async def _whole(self, request: Request, form: Form) -> dict[str, Any]:
        """Return a whole answer, as JSON."""
        async with self._manager.use(request.model) as managed:
            planned = await self._plan(managed, request)
            async with aclosing(self._pieces(managed, planned, echo=request.echo)) as pieces:
                async for _ in pieces:
                    pass
        best = [answer for answers in planned.answers for answer in _best(answers, request.answers)]
        return form.whole(best, usage_of(planned))

    async def _stream(self, request: Request, form: Form, lines: EventLines) -> str:
        """Send an answer piece by piece; return what has become of it."""
        try:
            async with self._manager.use(request.model) as managed:
                planned = await self._plan(managed, request)
                async with aclosing(self._pieces(managed, planned, echo=request.echo)) as new:
                    async for pieces in new:
                        text = PING if pieces is None else b"".join(_written(form, pieces))
                        if text:
                            await lines.write(text)
        except ManagerError as error:
            if not lines.begun:
                raise
            await lines.break_off(event(manager_error_object(error)))
            return error.code
        except ConnectionError:
            return CANCELLED
        if request.include_usage:
            await lines.write(event(form.last(usage_of(planned))))
        await lines.write(DONE)
        await lines.end()
        return OK

    async def _plan(self, managed: AsyncManagedModel, request: Request) -> Plan:
        """Return what is to be generated."""
        text = await self._texts.of(managed)
        prompts = await self._texts.tokens(text, request)
        return plan(request, text, prompts, self._max_rows)

    async def _pieces(
        self, managed: AsyncManagedModel, planned: Plan, *, echo: bool
    ) -> AsyncGenerator[Sequence[tuple[int, bool, Piece]] | None]:
        """Yield what comes of a request's answers, each piece with its choice's number.

        The middle one says whether it is the choice's first.  `None` means that nothing has come
        for a while.

        Raises:
            ManagerError: It has failed.
        """
        engine, ticket = self._engines.submit(managed, planned.jobs)
        run = _Run(engine, planned, echo=echo)
        try:
            while not run.is_over:
                try:
                    async with asyncio.timeout(KEEP_ALIVE):
                        events = await ticket.events()
                except TimeoutError:
                    yield None
                else:
                    yield [piece for one in events for piece in run.pieces(one)]
        finally:
            engine.withdraw(ticket)


class _Run:
    """The answers of one request while they are made.

    Args:
        engine: Who makes them.
        planned: What they are.
        echo: Whether they begin with their prompts.
    """

    def __init__(self, engine: Engine, planned: Plan, *, echo: bool) -> None:
        self._engine = engine
        self._echo = echo
        self._numbers: dict[Job, int] = {}
        self._answers: dict[Job, tuple[Answer, ...]] = {}
        number = 0
        for job, answers in zip(planned.jobs, planned.answers, strict=True):
            self._numbers[job] = number
            self._answers[job] = answers
            number += len(answers)
        self._left = number
        self._begun: set[int] = set()
        self._told: dict[Job, PromptTold] = {}

    @property
    def is_over(self) -> bool:
        """Whether all answers have ended."""
        return self._left == 0

    def pieces(self, event: Event) -> Iterator[tuple[int, bool, Piece]]:
        """Yield what an event makes of the answers.

        Raises:
            ManagerError: The job has failed, and the request with it.
        """
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PromptTold):
            self._told[event.job] = event
            return
        one = event.continuation
        answer = self._answers[one.job][one.number]
        if answer.finish is not None:
            return  # it came to a text at which it ends, and the engine did not know yet
        index = self._numbers[one.job] + one.number
        if index not in self._begun and self._echo:
            told = self._told.get(one.job)
            yield index, self._is_first(index), answer.echo(told.told if told else ())
        piece = answer.end() if isinstance(event, NothingMade) else answer.add(event)
        if piece.finish is not None:
            self._left -= 1
            self._engine.stop(one)
        if piece.text or piece.told or piece.finish or index not in self._begun:
            yield index, self._is_first(index), piece

    def _is_first(self, index: int) -> bool:
        first = index not in self._begun
        self._begun.add(index)
        return first


def _written(form: Form, pieces: Sequence[tuple[int, bool, Piece]]) -> Iterator[bytes]:
    """Yield pieces as events."""
    for index, is_first, piece in pieces:
        if is_first and (head := form.first(index)) is not None:
            yield event(head)
        yield event(form.piece(index, piece))


def _best(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Return the answers whose tokens are the most probable, the best first; all where all are."""
    if count == len(answers):
        return list(answers)
    return sorted(answers, key=lambda answer: answer.mean, reverse=True)[:count]


class Texts:
    """The tokenizers of loaded models; each is used by one caller at a time."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[AsyncManagedModel, TextModel] = WeakKeyDictionary()
        self._turn = asyncio.Lock()

    async def of(self, managed: AsyncManagedModel) -> TextModel:
        """Return what turns text into a model's tokens.

        Raises:
            NotGenerativeError: It gives no text.
        """
        known = self._known.get(managed)
        if known is not None:
            return known
        async with self._turn:
            if managed not in self._known:
                self._known[managed] = await asyncio.to_thread(
                    load_text_model, managed.config, managed.model
                )
            return self._known[managed]

    async def tokens(self, model: TextModel, request: Request) -> list[tuple[int, ...]]:
        """Return a request's prompts as tokens."""
        length = sum(len(prompt) for prompt in request.prompts if isinstance(prompt, str))
        if not request.is_chat and length <= SHORT_TEXT:
            return _tokens(model, request)
        async with self._turn:
            return await asyncio.to_thread(_tokens, model, request)


def _client_of(http: HttpRequest) -> str:
    """Return who sends a request, as it was let in."""
    client: str = http.scope["state"][CLIENT]
    return client


def _tokens(model: TextModel, request: Request) -> list[tuple[int, ...]]:
    if request.is_chat:
        wish = request.add_generation_prompt
        return [model.encode_chat(request.messages, add_generation_prompt=wish)]
    return [model.encode(one) if isinstance(one, str) else one for one in request.prompts]


def _not_found(model_id: str, known: Sequence[str] | dict[str, Any]) -> ModelNotFoundError:
    names = ", ".join(known) or "none"
    return ModelNotFoundError(
        f"there is no model {model_id[:128]!r} that answers; there are: {names}"
    )


async def _nobody_there(scope: Scope, receive: Receive, send: Send) -> None:
    """End a request whose client has gone: the status is for the metrics alone."""
    await EmptyResponse(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
