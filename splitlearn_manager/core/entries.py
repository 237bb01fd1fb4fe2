"""What the manager's table holds: one entry for each model, of the kind that its state asks for.

    loading             LoadingPlaceholder
    ready, unloading    AsyncManagedModel
    failed              FailedEntry

Each has `model_id`, `config`, `generation`, `status`, `since` and `info()`, and is settled by one
owner: the task that loads, or unloads, it.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from splitlearn_manager.config.options import PartOptions
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor
from splitlearn_manager.core.progress import LoadProgress
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import (
    LoadCancelledError,
    ManagerError,
    ModelFailedError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.resources import Reservation

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ModelInfo:
    """A snapshot of one model, for users.

    Attributes:
        model_id: Its id.
        status: Its state.
        component: `bottom`, `trunk`, …; `None` for a pipeline.
        start_layer: First layer; `None` while not known, and where it has no one range of layers.
        end_layer: One past the last layer; `None` likewise.
        device: Where it is, or is to be.
        dtype: Name of the weights' dtype; `None` while not known.
        loaded_at: When it became ready, in seconds since the epoch.
        last_used: When it was last used, likewise.
        request_count: Uses since it became ready.
        in_flight: Uses that have not ended.
        bytes_total: Bytes of weights to load.
        bytes_done: How many of them are in.
        reserved_bytes: Memory promised to it.
        resident_bytes: Memory that its weights take, measured when it was loaded.
        error: Why it failed.
    """

    model_id: str
    status: ModelStatus
    component: str | None = None
    start_layer: int | None = None
    end_layer: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    loaded_at: float | None = None
    last_used: float | None = None
    request_count: int = 0
    in_flight: int = 0
    bytes_total: int = 0
    bytes_done: int = 0
    reserved_bytes: int = 0
    resident_bytes: int = 0
    error: str | None = None


class LoadingPlaceholder:
    """Holds a model's place while it is loaded, and lets any number of callers wait for the end.

    Attributes:
        progress: What the loading thread reports.
        reservation: The memory promised to it, once its size is known.
        work: The call in a worker thread that the load is at.
    """

    def __init__(self, model_id: str, config: ModelConfig, *, generation: int = 0) -> None:
        self.model_id = model_id
        self.config = config
        self.generation = generation
        self.status = ModelStatus.LOADING
        self.since = time.monotonic()
        self.progress = LoadProgress()
        self.reservation: Reservation | None = None
        self.work: Future[Any] | None = None
        self._outcome: AsyncManagedModel | FailedEntry | None = None
        self._settled = asyncio.Event()

    def settle(self, outcome: AsyncManagedModel | FailedEntry) -> None:
        """Wake everybody who waits, with what became of the load."""
        self._outcome = outcome
        self._settled.set()

    async def outcome(self) -> AsyncManagedModel | FailedEntry:
        """Wait for the end of the load.  Cancelling this ends the waiting, not the load."""
        while self._outcome is None:
            await self._settled.wait()
        return self._outcome

    def cancellation(self) -> Exception:
        """Return why a load ended whose task was cancelled."""
        return self.progress.stopped or LoadCancelledError("the load was cancelled")

    def info(self) -> ModelInfo:
        """Return a snapshot."""
        return ModelInfo(
            model_id=self.model_id,
            status=self.status,
            component=_component(self.config),
            device=self.config.device,
            dtype=self.config.dtype,
            bytes_total=self.progress.bytes_total,
            bytes_done=self.progress.bytes_done,
            reserved_bytes=_held(self.reservation),
        )


class AsyncManagedModel:
    """A model that is loaded, with one worker thread of its own.

    All its forwards run in that thread, one after the other: they never run beside each other,
    and never on the event loop.

    Attributes:
        config: What it was loaded from.
        reservation: The memory promised to it.
        resident_bytes: What its weights were measured to take.
        loaded_at: When it became ready, in seconds since the epoch.
        last_used: When it was last used, likewise.
        request_count: How often it was used.
        in_flight: Uses that have not ended.
    """

    def __init__(
        self,
        model_id: str,
        model: Any,
        config: ModelConfig,
        *,
        generation: int = 0,
        reservation: Reservation | None = None,
        resident_bytes: int = 0,
    ) -> None:
        self.model_id = model_id
        self.config = config
        self.generation = generation
        self.status = ModelStatus.READY
        self.since = time.monotonic()
        self.reservation = reservation
        self.resident_bytes = resident_bytes
        self.loaded_at = time.time()
        self.last_used: float | None = None
        self.request_count = 0
        self.in_flight = 0
        self._model = model
        self._idle = asyncio.Event()
        self._idle.set()
        self._gone = asyncio.Event()
        self._closed: Future[None] | None = None
        self._worker = DaemonThreadPoolExecutor(1, f"splitlearn-model-{model_id}")

    @property
    def model(self) -> Any:
        """The model itself.

        Raises:
            ModelUnloadingError: It was unloaded.
        """
        if self._model is None:
            raise self._unloaded()
        return self._model

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the model's thread, after whatever is queued there.

        A thread can't be stopped.  A caller that is cancelled goes away at once: a function that
        still waits for its turn is then not run; one that runs goes on, and its result is dropped.

        Raises:
            ModelUnloadingError: The model was unloaded.
        """
        try:
            future = self._worker.submit(fn, *args, **kwargs)
        except RuntimeError:
            raise self._unloaded() from None
        return await asyncio.wrap_future(future)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward in its thread, without gradients."""
        return await self.run(partial(_forward, self.model), *args, **kwargs)

    def acquire(self) -> None:
        """Count a use; the model is not unloaded until `release`."""
        self.in_flight += 1
        self.request_count += 1
        self.last_used = time.time()
        self._idle.clear()

    def release(self) -> None:
        """Count the end of a use."""
        self.in_flight -= 1
        self.last_used = time.time()
        if self.in_flight == 0:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no use is in flight."""
        await self._idle.wait()

    def close(self) -> Future[None]:
        """Let the model go, once its thread has done all that is queued there; return the end.

        That happens in its thread, because freeing gigabytes takes a while, and because behind
        everything that is queued no forward can be at it.  The thread ends with it.
        """
        if self._closed is None:
            self._closed = self._worker.submit(self._let_go)
            self._worker.shutdown(wait=False)
        return self._closed

    def mark_gone(self) -> None:
        """Wake everybody who waits for the end of the unload."""
        self._gone.set()

    async def gone(self) -> None:
        """Wait for the end of the unload.  Cancelling this ends the waiting, not the unload."""
        await self._gone.wait()

    def info(self) -> ModelInfo:
        """Return a snapshot."""
        model = self._model
        return ModelInfo(
            model_id=self.model_id,
            status=self.status,
            component=getattr(model, "component", _component(self.config)),
            start_layer=getattr(model, "start_layer", None),
            end_layer=getattr(model, "end_layer", None),
            device=str(getattr(model, "device", self.config.device)),
            dtype=_dtype_name(getattr(model, "dtype", self.config.dtype)),
            loaded_at=self.loaded_at,
            last_used=self.last_used,
            request_count=self.request_count,
            in_flight=self.in_flight,
            bytes_total=self.resident_bytes,
            bytes_done=self.resident_bytes,
            reserved_bytes=_held(self.reservation),
            resident_bytes=self.resident_bytes,
        )

    def _let_go(self) -> None:
        """Close and drop the model, and say so if somebody else still has it."""
        close_model(self._model)
        alive, self._model = _weak_reference(self._model), None
        if alive() is None:
            return
        gc.collect()  # only here: it stops every thread, and most models are in no cycle
        if alive() is not None:
            logger.warning(
                "model %s is unloaded, but something else still refers to it: its memory is not"
                " back",
                self.model_id,
            )

    def _unloaded(self) -> ModelUnloadingError:
        return ModelUnloadingError(f"model {self.model_id!r} was unloaded")


class FailedEntry:
    """Keeps why a load failed.  It takes no memory and no room in the table's limit.

    Attributes:
        reason: Why, in words.
        cause: The error, without the frames that it came through.
        failed_at: When, in seconds since the epoch.
        reservation: What the load had, until its thread has really ended.
    """

    def __init__(self, placeholder: LoadingPlaceholder, cause: BaseException) -> None:
        self.model_id = placeholder.model_id
        self.config = placeholder.config
        self.generation = placeholder.generation
        self.status = ModelStatus.FAILED
        self.since = time.monotonic()
        self.failed_at = time.time()
        self.cause = without_frames(cause)
        self.reason = describe(cause)
        self.reservation = placeholder.reservation

    def error(self) -> ModelFailedError:
        """Return what somebody who wants the model is told."""
        error = ModelFailedError(f"model {self.model_id!r} failed to load: {self.reason}")
        error.__cause__ = self.cause
        return error

    def load_error(self) -> ManagerError:
        """Return what somebody who waited for the load is told, an object for each of them."""
        return copy.copy(self.cause) if isinstance(self.cause, ManagerError) else self.error()

    def info(self) -> ModelInfo:
        """Return a snapshot."""
        return ModelInfo(
            model_id=self.model_id,
            status=self.status,
            component=_component(self.config),
            device=self.config.device,
            dtype=self.config.dtype,
            reserved_bytes=_held(self.reservation),
            error=self.reason,
        )


Entry = LoadingPlaceholder | AsyncManagedModel | FailedEntry


def close_model(model: Any) -> None:
    """Close what a model holds besides memory (a pipeline: its connections), if it can be closed.

    May block.  An error is logged and goes no further: the model goes all the same.
    """
    close = getattr(model, "close", None)
    if close is not None:
        try:
            close()
        except Exception:
            logger.exception("closing a %s failed", type(model).__name__)


def describe(error: BaseException) -> str:
    """Return an error in words: ours as they are, others with their type before them."""
    if isinstance(error, ManagerError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def without_frames(error: BaseException) -> BaseException:
    """Drop the frames from an error, its causes and its contexts, in place.

    A frame keeps its local variables alive: after a failed load, the tensors that were already
    read, for as long as anybody keeps the error.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            waiting += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]
    return error


def _forward(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a model without recording gradients."""
    import torch  # noqa: PLC0415 - whoever calls a model has paid for it already

    with torch.no_grad():
        return model(*args, **kwargs)


def _weak_reference(model: Any) -> Callable[[], Any]:
    """Return what gives the model as long as it lives; nothing, where that can't be seen."""
    try:
        return weakref.ref(model)
    except TypeError:
        return lambda: None


def _component(config: ModelConfig) -> str | None:
    """Return which part a configuration asks for; a pipeline is none."""
    options = config.options
    return options.component if isinstance(options, PartOptions) else None


def _dtype_name(dtype: Any) -> str | None:
    """Return `float32` for `torch.float32` and for `"float32"`."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _held(reservation: Reservation | None) -> int:
    """Return the bytes that are reserved now."""
    return 0 if reservation is None else reservation.nbytes
