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
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from splitlearn_manager.config.options import PartOptions
from splitlearn_manager.core.disposal import close_model, see_it_gone, weak_reference
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor
from splitlearn_manager.core.failures import describe, failure_code, without_frames
from splitlearn_manager.core.lease import Hold, Lease, Use
from splitlearn_manager.core.model_info import ModelInfo
from splitlearn_manager.core.progress import LoadProgress, Pace
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import (
    DrainTimeoutError,
    LoadCancelledError,
    ManagerError,
    ModelFailedError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.drain import Drain
    from splitlearn_manager.core.resources import Reservation

P = ParamSpec("P")
T = TypeVar("T")


class LoadingPlaceholder:
    """Holds a model's place while it is loaded, and lets any number of callers wait for the end.

    Attributes:
        operation_id: Of the load, in events and logs.
        progress: What the loading thread reports.
        pace: How fast bytes come, as the load's owner samples it.
        reservation: The memory promised to it, once its size is known.
        work: The call in a worker thread that the load is at.
        remains: Done when nothing of an attempt that failed is left: its thread is out of it, and
            its memory given back; `None` while there was none.
        owner: The task that settles it.
        predicted_bytes: What it was estimated to take once it is loaded; 0 while not known.
        setback: Why its last attempt failed, where it is tried again.
    """

    def __init__(
        self, model_id: str, config: ModelConfig, *, generation: int = 0, operation_id: str = ""
    ) -> None:
        self.model_id = model_id
        self.config = config
        self.generation = generation
        self.operation_id = operation_id
        self.status = ModelStatus.LOADING
        self.since = time.monotonic()
        self.progress = LoadProgress()
        self.pace = Pace()
        self.reservation: Reservation | None = None
        self.work: Future[Any] | None = None
        self.remains: Future[None] | None = None
        self.owner: asyncio.Task[None] | None = None
        self.predicted_bytes = 0
        self.setback: str | None = None
        self._outcome: AsyncManagedModel | FailedEntry | None = None
        self._settled = asyncio.Event()

    @property
    def is_settled(self) -> bool:
        """Whether its load has ended."""
        return self._outcome is not None

    def settle(self, outcome: AsyncManagedModel | FailedEntry) -> None:
        """Wake everybody who waits, with what became of the load."""
        self._outcome = outcome
        self._settled.set()

    async def outcome(self) -> AsyncManagedModel | FailedEntry:
        """Wait for the end of the load.  Cancelling this ends the waiting, not the load."""
        while self._outcome is None:
            await self._settled.wait()
        return self._outcome

    def times(self) -> tuple[float, float]:
        """Return the seconds since it was asked for, and how many of them it waited."""
        return time.monotonic() - self.since, self.progress.waited_s

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
            reserved_bytes=_held(self.reservation),
            predicted_bytes=self.predicted_bytes,
            error=self.setback,
            generation=self.generation,
            pinned=self.config.pinned,
            **self.motion(),
        )

    def motion(self) -> dict[str, Any]:
        """Return what a snapshot says of a load under way."""
        progress = self.progress
        left = progress.bytes_total - progress.bytes_done
        return {
            "phase": progress.phase,
            "bytes_total": progress.bytes_total,
            "bytes_done": progress.bytes_done,
            "elapsed_s": time.monotonic() - self.since,
            "bytes_per_second": self.pace.rate(),
            "seconds_left": self.pace.seconds_left(left) if progress.bytes_total else None,
        }


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
        operation_id: Of the load that made it, and once it is being unloaded, of that.
        drain: Its drain, once it is being unloaded.
        timer: When to see whether its time to live is up.
        unreturned_bytes: Once it is gone, what of its memory is not back.
        idle_since: When it was last used, or else loaded, on the monotonic clock: the clock that
            people see may be set back.
        on_idle: Called when the last lease on it has ended.
        evicted: Whether it goes to make room, so that it no longer counts.
        predicted_bytes: What it was estimated to take.
        load_times: Seconds that its load took, and how many of them it waited.
        kv_cache_budget: Bytes of its reservation that are for the caches of its sessions, which
            may have no more; `None` where they have to be reserved as they come.
        kv_cache_bytes: What those have, as `serving.cache_memory` counts it.
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
        operation_id: str = "",
        predicted_bytes: int = 0,
        load_times: tuple[float, float] | None = None,
    ) -> None:
        self.model_id = model_id
        self.config = config
        self.generation = generation
        self.operation_id = operation_id
        self.status = ModelStatus.READY
        self.since = time.monotonic()
        self.reservation = reservation
        self.resident_bytes = resident_bytes
        self.predicted_bytes = predicted_bytes
        self.load_times = load_times
        self.loaded_at = time.time()
        self.last_used: float | None = None
        self.idle_since = self.since
        self.request_count = 0
        self.in_flight = 0
        self.drain: Drain | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.unreturned_bytes = 0
        self.evicted = False
        self.kv_cache_budget: int | None = None
        self.kv_cache_bytes = 0
        self.on_idle: Callable[[], None] | None = None
        self._model = model
        self._leases: set[Lease] = set()
        self._cut = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._gone = asyncio.Event()
        self._closed: Future[Any] | None = None
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
        if self._closed is not None:
            raise self._unloaded()
        return await self._worker.run(fn, *args, **kwargs)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward in its thread, without gradients."""
        return await self.run(self._forward, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without recording gradients; in its thread.

        Looked up here, so that no frame of a caller has the model: an error that somebody keeps
        would keep it.
        """
        import torch  # noqa: PLC0415 - whoever calls a model has paid for it already

        with torch.no_grad():
            return self.model(*args, **kwargs)

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a lease on it."""
        return not self._leases

    def use(self) -> Use:
        """Lend this very load of the model to a block, also while it is being drained.

        For whoever has a hold on it; anybody else asks the manager.

        Raises:
            ModelUnloadingError: On entering: its drain is over.
        """
        return Use(self._lendable)

    def hold(self, ended: Callable[[ManagerError], None]) -> Hold:
        """Keep it from being unloaded until `Hold.release`.

        Args:
            ended: Called once if the deadline of a drain comes first.

        Raises:
            ModelUnloadingError: Its drain is over.
        """
        return Hold(self._lendable(), ended)

    def lend(self, lease: Lease, *, counts: bool = True) -> None:
        """Count a lease; the model is not unloaded until `give_back`."""
        self._leases.add(lease)
        self._idle.clear()
        if counts:
            self.in_flight += 1
            self.request_count += 1
        self._note_use()

    def give_back(self, lease: Lease) -> None:
        """Count the end of a lease; a second time does nothing."""
        if lease not in self._leases:
            return
        self._leases.remove(lease)
        self.in_flight -= isinstance(lease, Use)
        self._note_use()
        if not self._leases:
            self._idle.set()
            if self.on_idle is not None:
                self.on_idle()

    def _note_use(self) -> None:
        """Note that a use begins, or ends, now."""
        self.last_used, self.idle_since = time.time(), time.monotonic()

    async def idle(self) -> None:
        """Wait until there is no lease."""
        await self._idle.wait()

    def stop_timer(self) -> None:
        """Forget when to see whether its time to live is up."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def cut(self, reason: str) -> int:
        """End every lease that is left, saying why, and allow no more; return how many they were.

        Each gives itself back as soon as its owner runs.  Each gets an error of its own: the frames
        that one comes through stay with who gets it.
        """
        self._cut = True
        leases = list(self._leases)
        for lease in leases:
            lease.end(DrainTimeoutError(reason))
        return len(leases)

    def _lendable(self) -> AsyncManagedModel:
        """Return itself, unless its drain is over."""
        over = self.drain is not None and self.drain.is_over
        if over or self._cut or self._closed is not None:
            raise self._unloaded()
        return self

    def close(self) -> Future[Any]:
        """Let the model go, once its thread has done all that is queued there; return the end.

        That happens in its thread, because freeing gigabytes takes a while, and because behind
        everything that is queued no forward can be at it.  The thread ends with it.

        Returns:
            A future of what still refers to the model then: a weak reference, or `None`.
        """
        if self._closed is None:
            try:
                self._closed = self._worker.submit(self._let_go)
            except RuntimeError:  # it has no thread, and the system none to spare
                self._closed = Future()
                self._closed.set_result(self._let_go())
            self._worker.shutdown(wait=False)
        return self._closed

    def release_cache_budget(self) -> None:
        """Give back what was reserved for sessions: there are none any more, nor will be."""
        if self.reservation is not None and self.kv_cache_budget:
            self.reservation.resize(self.reservation.nbytes - self.kv_cache_budget)
            self.kv_cache_budget = 0

    def mark_gone(self) -> None:
        """Wake everybody who waits for the end of the unload."""
        self._gone.set()

    async def gone(self) -> None:
        """Wait for the end of the unload.  Cancelling this ends the waiting, not the unload."""
        await self._gone.wait()

    def info(self, successor: LoadingPlaceholder | None = None) -> ModelInfo:
        """Return a snapshot.

        Args:
            successor: The load that is to take its place, where there is one.
        """
        model = self._model
        info = ModelInfo(
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
            predicted_bytes=self.predicted_bytes,
            bytes_done=self.resident_bytes,
            reserved_bytes=_held(self.reservation),
            resident_bytes=self.resident_bytes,
            generation=self.generation,
            pinned=self.config.pinned,
            quantization=getattr(model, "quantization", None),
            kv_cache_budget=self.kv_cache_budget,
            kv_cache_bytes=self.kv_cache_bytes,
        )
        if successor is None:
            return info
        return replace(info, reloading=True, error=successor.setback, **successor.motion())

    def _let_go(self) -> Callable[[], Any] | None:
        """Close and drop the model; return a reference to it if somebody else still has it."""
        close_model(self._model)
        alive, self._model = weak_reference(self._model), None
        return see_it_gone(alive)

    def _unloaded(self) -> ModelUnloadingError:
        return ModelUnloadingError(f"model {self.model_id!r} was unloaded")


class FailedEntry:
    """Keeps why a load failed.  It takes no memory and no room in the table's limit.

    Attributes:
        reason: Why, in words.
        code: Why, in a word for programs.
        cause: The error, without the frames that it came through.
        failed_at: When, in seconds since the epoch.
        retry_at: When loading it again may help, likewise; `None` if that never will.
        reservation: What the load had, until its thread has really ended.
        load_times: Seconds until it failed, and how many of them it waited.
    """

    def __init__(
        self,
        placeholder: LoadingPlaceholder,
        cause: BaseException,
        retry_after: float | None = None,
    ) -> None:
        self.model_id = placeholder.model_id
        self.config = placeholder.config
        self.generation = placeholder.generation
        self.status = ModelStatus.FAILED
        self.since = time.monotonic()
        self.failed_at = time.time()
        self.cause = without_frames(cause)
        self.retry_at = None if retry_after is None else self.failed_at + retry_after
        self.reason = describe(cause)
        self.code = failure_code(cause)
        self.operation_id = placeholder.operation_id
        self.reservation = placeholder.reservation
        self.load_times = placeholder.times()

    def error(self) -> ModelFailedError:
        """Return what somebody who wants the model is told."""
        error = ModelFailedError(f"model {self.model_id!r} failed to load: {self.reason}")
        error.__cause__ = self.cause
        return error

    def load_error(self) -> ManagerError:
        """Return what somebody who waited for the load is told, an object for each of them."""
        if not isinstance(self.cause, ManagerError):
            return self.error()
        error = copy.copy(self.cause)
        error.__cause__ = self.cause.__cause__  # which no copy has
        return error

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
            generation=self.generation,
            failed_at=self.failed_at,
            retry_at=self.retry_at,
            pinned=self.config.pinned,
        )


Entry = LoadingPlaceholder | AsyncManagedModel | FailedEntry


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
