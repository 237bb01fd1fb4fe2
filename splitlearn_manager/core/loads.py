"""Loading: each load has one task, its owner, which settles the load's entry whatever happens.

The owner appraises the model from its headers, has memory promised, lets a worker thread load it,
watches that thread, tries again where that may help, and in the end puts a ready or a failed entry
into the table.  A thread can't be ended: one that is given up finds out at its next report, and
what it had is released when it has ended, not before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from splitlearn_manager.config.units import format_bytes
from splitlearn_manager.core.deadlines import LoadClock, LoadDeadlines
from splitlearn_manager.core.disposal import (
    close_model,
    release_when_gone,
    see_it_gone,
    weak_reference,
)
from splitlearn_manager.core.doorbell import in_loop
from splitlearn_manager.core.entries import AsyncManagedModel, FailedEntry
from splitlearn_manager.core.events import ProgressEvent, ReloadFailedEvent
from splitlearn_manager.core.failures import describe
from splitlearn_manager.core.model_loader import LoadedModel, contained, run_load
from splitlearn_manager.core.retry import RetryPolicy, may_heal
from splitlearn_manager.core.states import LoadPhase, ModelStatus
from splitlearn_manager.errors import (
    InsufficientResourcesError,
    LoadCancelledError,
    LoadTimeoutError,
)

if TYPE_CHECKING:
    from splitlearn_core.estimate import MemoryEstimate
    from splitlearn_core.machine import Memory
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.entries import LoadingPlaceholder
    from splitlearn_manager.core.executor import DaemonThreadPoolExecutor
    from splitlearn_manager.core.model_loader import Loader
    from splitlearn_manager.core.owners import Owners
    from splitlearn_manager.core.progress import LoadProgress
    from splitlearn_manager.core.resources import Reservation, ResourceManager
    from splitlearn_manager.core.table import ModelTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK = 0.25
"""Seconds between two looks at a load: for its deadlines, and for those who watch its progress."""

_SEE_OFF = 1.0
"""Seconds that the owner of a failed load stays for its thread; who waits for the load does not."""

Sleep = Callable[[float], Awaitable[None]]


class Gate(Protocol):
    """Who promises memory to loads."""

    async def reserve(self, model_id: str, nbytes: int, device: str, memory: Memory) -> Reservation:
        """Return the promise, or raise why there is none."""


@dataclass(frozen=True)
class LoadPolicy:
    """How patient loads are.

    Attributes:
        deadlines: When one is given up.
        retry: When one is tried again.
        sleep: Waits between two attempts.
    """

    deadlines: LoadDeadlines = field(default_factory=LoadDeadlines)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    sleep: Sleep = asyncio.sleep


class Loads:
    """The loads of one manager.

    Args:
        table: Where they are settled.
        lock: The manager's.
        owners: Who keeps their tasks.
        executor: Whose threads load.
        loader: What they run.
        resources: What there is.
        gate: Who promises it.
        policy: How patient they are.
        replaced: Called with a model that a reload has replaced, to drain it.
        became_ready: Called with every model that has become ready.

    Attributes:
        policy: How patient loads are from now on; those under way keep their deadlines.
    """

    def __init__(
        self,
        table: ModelTable,
        lock: asyncio.Lock,
        owners: Owners,
        executor: DaemonThreadPoolExecutor,
        loader: Loader,
        resources: ResourceManager,
        gate: Gate,
        policy: LoadPolicy,
        replaced: Callable[[AsyncManagedModel], None],
        became_ready: Callable[[AsyncManagedModel], None],
    ) -> None:
        self._table = table
        self._lock = lock
        self._owners = owners
        self._executor = executor
        self._loader = loader
        self._resources = resources
        self._gate = gate
        self.policy = policy
        self._replaced = replaced
        self._became_ready = became_ready

    def start(self, config: ModelConfig, reason: str) -> LoadingPlaceholder:
        """Take a model's place in the table, and start the task that owns its load."""
        placeholder = self._table.new_placeholder(config)
        self._table.move(placeholder, ModelStatus.LOADING, reason)
        self._own(placeholder, "load")
        return placeholder

    def start_successor(self, config: ModelConfig) -> LoadingPlaceholder:
        """Start a load that will replace the ready model of the same id, if it succeeds."""
        placeholder = self._table.new_placeholder(config)
        self._table.successors[config.model_id] = placeholder
        self._own(placeholder, "reload")
        return placeholder

    def cancel(self, placeholder: LoadingPlaceholder, error: Exception) -> None:
        """End a load: it is settled in its owner's next step, its thread ends when it can.

        Args:
            placeholder: The load.
            error: What those who wait for it are told.
        """
        placeholder.progress.stop(error)
        if placeholder.owner is not None:
            placeholder.owner.cancel()

    def _own(self, placeholder: LoadingPlaceholder, kind: str) -> None:
        name = f"{kind} of model {placeholder.model_id}"
        placeholder.owner = self._owners.own(self._load(placeholder), name)
        placeholder.owner.add_done_callback(partial(self._see_it_settled, placeholder))

    def _see_it_settled(self, placeholder: LoadingPlaceholder, owner: asyncio.Task[None]) -> None:
        """Settle a load whose owner did not: one that is cancelled before its first step has none.

        What else ended the owner is a bug, which is told rather than left to hang.
        """
        if not placeholder.is_settled:
            error = None if owner.cancelled() else owner.exception()
            self._make_failed(placeholder, error or asyncio.CancelledError())

    # --- One load --------------------------------------------------------------------------

    async def _load(self, placeholder: LoadingPlaceholder) -> None:
        """Own a load: every way out of here settles the placeholder."""
        try:
            loaded, estimate = await self._attempts(placeholder)
            await self._make_ready(placeholder, loaded, estimate)
        except BaseException as error:
            self._make_failed(placeholder, error)
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise
            await _see_off(placeholder)

    async def _attempts(
        self, placeholder: LoadingPlaceholder
    ) -> tuple[LoadedModel, MemoryEstimate]:
        """Try until it succeeds, or until trying again makes no sense."""
        failures = 0
        while True:
            try:
                return await self._attempt(placeholder)
            except Exception as error:
                failures += 1
                delay = self.policy.retry.delay(failures, error)
                if delay is None or placeholder.progress.stopped is not None:
                    raise
                _give_back(placeholder)
                placeholder.setback = describe(error)
                logger.warning(
                    "loading model %s failed (%s); trying again in %.1f s",
                    placeholder.model_id,
                    placeholder.setback,
                    delay,
                )
            placeholder.progress.enter(LoadPhase.QUEUED)
            with self._told(placeholder):
                await self.policy.sleep(delay)

    async def _attempt(self, placeholder: LoadingPlaceholder) -> tuple[LoadedModel, MemoryEstimate]:
        """Appraise, reserve, load."""
        config, progress = placeholder.config, placeholder.progress
        estimate, memory = await self._work(placeholder, self._appraise, config, progress)
        placeholder.predicted_bytes = estimate.steady_bytes
        progress(0, estimate.steady_bytes)
        progress.enter(LoadPhase.WAITING_FOR_MEMORY)
        most = max(estimate.peak_bytes, estimate.steady_bytes + (config.kv_cache_memory or 0))
        placeholder.reservation = await self._promise(placeholder, most, memory)
        progress.enter(LoadPhase.QUEUED)
        loaded = await self._work(placeholder, run_load, self._loader, config, progress)
        return loaded, estimate

    async def _promise(
        self, placeholder: LoadingPlaceholder, nbytes: int, memory: Memory
    ) -> Reservation:
        """Wait for the promise of memory; a refusal says what of it could be less."""
        model_id, device = placeholder.model_id, placeholder.config.device
        try:
            with self._told(placeholder):
                return await self._gate.reserve(model_id, nbytes, device, memory)
        except InsufficientResourcesError as error:
            refusal = f"{error}{self._advice(placeholder)}"
        raise InsufficientResourcesError(refusal)

    def _advice(self, placeholder: LoadingPlaceholder) -> str:
        """Return what else there is where a load does not fit."""
        advice, caches = "", placeholder.config.kv_cache_memory
        if caches is not None:
            advice = f"; {format_bytes(caches)} of it is for its sessions (kv_cache_memory)"
        if self._table.successors.get(placeholder.model_id) is placeholder:
            advice += "; to unload the old one first, reload with the policy unload_first"
        return advice

    @contextmanager
    def _told(self, placeholder: LoadingPlaceholder) -> Iterator[None]:
        """Tell now and then of a load that waits: there is no thread to be watched meanwhile."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def tell() -> None:
            nonlocal timer
            self._table.bus.publish(progress_event(placeholder))
            timer = loop.call_later(TICK, tell)

        timer = loop.call_later(TICK, tell)
        try:
            yield
        finally:
            timer.cancel()

    def _appraise(
        self, config: ModelConfig, progress: LoadProgress
    ) -> tuple[MemoryEstimate, Memory]:
        """Return what a load will need, and what there is; in a worker thread, as it may take long.

        The capacity is looked up as well, so that it is known when the lock is held.
        """
        progress.enter(LoadPhase.READING)
        return contained(config, self._look_up, config)

    def _look_up(self, config: ModelConfig) -> tuple[MemoryEstimate, Memory]:
        estimate = self._loader.estimate(config)
        self._resources.capacity(config.device)
        return estimate, self._resources.memory(config.device)

    async def _work(self, placeholder: LoadingPlaceholder, fn: Callable[..., T], *args: Any) -> T:
        """Run one step of a load in a worker thread, and watch it.

        Raises:
            LoadTimeoutError: It does not move, or takes too long.
        """
        # in this task's context, so that logs of the thread have the id of the request behind it
        future: Future[T] = self._executor.submit(copy_context().run, fn, *args)
        placeholder.work = future
        result = in_loop(future)
        result.add_done_callback(_look_at)
        clock = LoadClock(self.policy.deadlines, time.monotonic())
        while not result.done():
            await asyncio.wait({result}, timeout=TICK)
            if not result.done():
                self._watch(placeholder, clock, running=future.running())
        return result.result()

    def _watch(self, placeholder: LoadingPlaceholder, clock: LoadClock, *, running: bool) -> None:
        """Look once at a load under way."""
        progress, now = placeholder.progress, time.monotonic()
        if progress.phase is LoadPhase.READING or progress.phase is LoadPhase.DOWNLOADING:
            placeholder.pace.sample(now, progress.bytes_done)
        self._table.bus.publish(progress_event(placeholder))
        if not running:
            clock.pause(now)
        elif why := clock.overdue(progress.mark(), progress.bytes_total, now):
            raise LoadTimeoutError(
                f"the load of model {placeholder.model_id!r} {why} ({progress.phase.value},"
                f" {progress.bytes_done} of {progress.bytes_total} bytes)"
            )

    # --- Its end ---------------------------------------------------------------------------

    async def _make_ready(
        self, placeholder: LoadingPlaceholder, loaded: LoadedModel, estimate: MemoryEstimate
    ) -> None:
        """Put the model in the place that was held for it, with the memory that it really takes.

        Raises:
            ManagerError: The load was told to stop, or was given up and the place is another's:
                a thread that comes late never overwrites a newer entry.
        """
        async with self._lock:
            placeholder.progress.check()
            if not self._is_current(placeholder):
                raise LoadCancelledError("the load was given up before it ended")
            managed = AsyncManagedModel(
                placeholder.model_id,
                loaded.take(),
                placeholder.config,
                generation=placeholder.generation,
                reservation=placeholder.reservation,
                resident_bytes=loaded.resident_bytes or 0,
                operation_id=placeholder.operation_id,
                predicted_bytes=placeholder.predicted_bytes,
                load_times=placeholder.times(),
            )
            managed.kv_cache_budget = _settle_reservation(placeholder, loaded, estimate)
            self._put(placeholder, managed)
            placeholder.work = None
            placeholder.settle(managed)
            self._became_ready(managed)

    def _put(self, placeholder: LoadingPlaceholder, managed: AsyncManagedModel) -> None:
        """Make the move into the table."""
        if self._table.successors.get(placeholder.model_id) is placeholder:
            del self._table.successors[placeholder.model_id]
            self._replaced(self._table.replace(managed, "reloaded"))
        else:
            self._table.move(managed, ModelStatus.READY, "loaded")

    def _make_failed(self, placeholder: LoadingPlaceholder, error: BaseException) -> None:
        """Put the reason in the place that was held for the model.

        Synchronous, and without the lock, so that a task that is being cancelled gets through:
        nobody holds the lock while another task runs, so that one step needs none.  A thread that
        is still at the load is asked to stop.
        """
        cause = error if isinstance(error, Exception) else placeholder.cancellation()
        placeholder.progress.stop(LoadCancelledError("the load was given up before it ended"))
        current = self._is_current(placeholder)
        retry = self.policy.retry
        pause = retry.pause(retry.attempts) if may_heal(cause) else None
        failed = FailedEntry(placeholder, cause, pause)
        _give_back(placeholder)
        if self._table.successors.get(placeholder.model_id) is placeholder:
            del self._table.successors[placeholder.model_id]
            self._tell_failed_reload(failed)
        elif current:
            self._table.move(failed, ModelStatus.FAILED, failed.reason, code=failed.code)
        placeholder.settle(failed)

    def _tell_failed_reload(self, failed: FailedEntry) -> None:
        """Tell that a model stays as it was."""
        event = ReloadFailedEvent(
            failed.model_id,
            failed.generation,
            failed.operation_id,
            failed.reason,
            failed.code,
            failed.failed_at,
        )
        self._table.reload_failed(event)

    def _is_current(self, placeholder: LoadingPlaceholder) -> bool:
        """Whether the place in the table is still the one that this load took."""
        return self._table.load_under_way(placeholder.model_id) is placeholder


def progress_event(placeholder: LoadingPlaceholder) -> ProgressEvent:
    """Return how far a load is."""
    motion = placeholder.motion()
    return ProgressEvent(
        model_id=placeholder.model_id,
        generation=placeholder.generation,
        operation_id=placeholder.operation_id,
        at=time.time(),
        **motion,
    )


def _settle_reservation(
    placeholder: LoadingPlaceholder, loaded: LoadedModel, estimate: MemoryEstimate
) -> int | None:
    """Let the measured size of a model replace the estimate of its load.

    Returns:
        What is left for its sessions, of what is to be reserved for them; `None` for nothing
        reserved.
    """
    caches = placeholder.config.kv_cache_memory
    if placeholder.reservation is None:
        return caches
    measured = loaded.resident_bytes
    size = estimate.steady_bytes if measured is None else measured
    if short := placeholder.reservation.resize(size + (caches or 0)):
        logger.warning(
            "model %s takes %d bytes%s, which is %d more than could be reserved for it",
            placeholder.model_id,
            size,
            f", and {caches} for its sessions" if caches else "",
            short,
        )
    return None if caches is None else max(0, caches - short)


def _give_back(placeholder: LoadingPlaceholder) -> None:
    """Release what a failed load has: now, or when a thread that is still at it has ended."""
    work, reservation = placeholder.work, placeholder.reservation
    placeholder.work = placeholder.reservation = None
    if reservation is not None:
        reservation.leaving = True
    if work is not None:
        placeholder.remains = Future()
        work.cancel()
        work.add_done_callback(partial(_discard, reservation, placeholder.remains))


async def _see_off(placeholder: LoadingPlaceholder) -> None:
    """Wait a little until nothing of a failed load is left, so that a shutdown does, too."""
    if placeholder.remains is None or placeholder.remains.done():
        return
    _, late = await asyncio.wait({in_loop(placeholder.remains)}, timeout=_SEE_OFF)
    if late:
        logger.warning(
            "the load of model %s has ended, its thread has not yet, and is left behind",
            placeholder.model_id,
        )


def _discard(reservation: Reservation | None, remains: Future[None], work: Future[Any]) -> None:
    """Release the memory of a step that has ended, after that of a model that nobody waits for."""
    failed = work.cancelled() or work.exception() is not None
    if failed or not isinstance(work.result(), LoadedModel):
        release_when_gone(reservation, None)
        remains.set_result(None)
        return
    # in a thread of its own: closing and freeing take a while, and this may be the event loop's
    arguments = (work.result(), reservation, remains)
    try:
        Thread(target=_drop, args=arguments, name="splitlearn-discard", daemon=True).start()
    except RuntimeError:  # the system has none to spare
        _drop(*arguments)


def _drop(loaded: LoadedModel, reservation: Reservation | None, remains: Future[None]) -> None:
    """Close a model that came too late, and drop it."""
    model = loaded.take()
    close_model(model)
    alive = weak_reference(model)
    del model
    release_when_gone(reservation, see_it_gone(alive))
    remains.set_result(None)


def _look_at(result: asyncio.Future[Any]) -> None:
    """Note the error of a step that nobody waits for any more, so that asyncio does not."""
    if not result.cancelled():
        result.exception()
