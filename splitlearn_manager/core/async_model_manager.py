"""`AsyncModelManager`: owns models over time.

It reads in the order of a model's life: load, use, look at, unload; then the manager's own end,
and last the table that all of them change.

Who owns what:

- The manager owns a load, and its caller only waits for it.  Each load has one task, its owner,
  which settles the model's entry whatever happens: as ready, or as failed with the reason.  An
  unload has one too.  A caller that is cancelled or times out goes away alone.
- Everything runs on the event loop's thread, except the loader, which runs in a pool of worker
  threads, and forwards, which run in a thread for each model.  `self.lock` is held for a look at
  the table and the decision that follows, never across waiting for anything else.
- Memory is reserved before a load starts, and given back when the model is gone, or when the
  thread of a load that was given up has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from splitlearn_manager.core.entries import (
    AsyncManagedModel,
    FailedEntry,
    LoadingPlaceholder,
    close_model,
)
from splitlearn_manager.core.events import TransitionEvent, log_transition
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor
from splitlearn_manager.core.model_loader import LoadedModel, ModelLoader, contained, run_load
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.states import ABSENT, LoadPhase, ModelStatus, transition
from splitlearn_manager.errors import (
    DrainTimeoutError,
    InsufficientResourcesError,
    LoadCancelledError,
    ManagerClosedError,
    ModelAlreadyLoadedError,
    ModelLoadingError,
    ModelNotFoundError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from concurrent.futures import Future
    from types import TracebackType

    from splitlearn_core.estimate import MemoryEstimate
    from splitlearn_core.machine import Memory
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.entries import Entry, ModelInfo
    from splitlearn_manager.core.events import TransitionObserver
    from splitlearn_manager.core.model_loader import Loader
    from splitlearn_manager.core.resources import Reservation
    from splitlearn_manager.core.states import State

logger = logging.getLogger(__name__)

T = TypeVar("T")

DRAIN_TIMEOUT = 20.0
"""Seconds that uses in flight are given, where the caller says nothing."""


class AsyncModelManager:
    """Loads models, lends them out, and unloads them.

        async with AsyncModelManager() as manager:
            await manager.load_model(ModelConfig("trunk", path, config={"split_points": [2, 6]}))
            async with manager.use("trunk") as model:
                hidden = await model(hidden)

    Args:
        resource_manager: Who promises memory; by default up to 80 % of the machine's.
        max_models: Most models at once; failed ones don't count.
        max_workers: Most loads at once; more wait their turn.
        loader: Who loads them.
        single_threaded: Let torch compute with one thread, in the whole process.
        num_threads: Let torch compute with so many, instead.

    Attributes:
        models: The table: one entry for each model.  To be changed by the manager alone.
        on_transition: Called with every `TransitionEvent`, in order; the first one logs it.

    Making a manager imports torch and sets its threads, once, before any of them runs; with
    `single_threaded=False` and no `num_threads` it does neither.
    """

    def __init__(
        self,
        resource_manager: ResourceManager | None = None,
        max_models: int = 5,
        max_workers: int = 4,
        loader: Loader | None = None,
        *,
        single_threaded: bool = True,
        num_threads: int | None = None,
    ) -> None:
        if max_models < 1:
            raise ValueError(f"max_models must be at least 1, found {max_models}")
        _configure_threads(single_threaded, num_threads)
        self.resource_manager = ResourceManager() if resource_manager is None else resource_manager
        self.max_models = max_models
        self.loader: Loader = ModelLoader() if loader is None else loader
        self.executor = DaemonThreadPoolExecutor(max_workers, "splitlearn-loader")
        self.models: dict[str, Entry] = {}
        self.lock = asyncio.Lock()
        self.on_transition: list[TransitionObserver] = [log_transition]
        self._generations = itertools.count(1)
        self._owners: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Return the manager itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Shut down."""
        await self.shutdown()

    # --- Loading ---------------------------------------------------------------------------

    async def load_model(self, config: ModelConfig) -> bool:
        """Load a model, and return `True` when it is ready.

        The load belongs to the manager: if the caller is cancelled or times out, it goes on, and
        ends in a ready or a failed model all the same.

        Raises:
            ConfigError: (a `ValueError`) The configuration is wrong; nothing was changed.
            ModelAlreadyLoadedError: (a `ValueError`) A model with that id is loaded.
            ModelLoadingError: (a `ValueError`) One is being loaded.
            InsufficientResourcesError: (a `RuntimeError`) It does not fit.
            ModelFailedError: (a `RuntimeError`) Loading failed; `__cause__` is the loader's error.
            ManagerClosedError: (a `RuntimeError`) The manager shuts down.
        """
        config.validate()
        async with self.lock:
            self._refuse_if_taken(config.model_id)
            placeholder = self._start_load(config)
        return await self._wait_for_load(placeholder)

    async def ensure_model(self, config: ModelConfig) -> bool:
        """Return `True` when the model is ready, loading it if nobody has.

        A load in flight with an equal configuration is joined; a model that is ready with an
        equal configuration is left as it is.

        Raises:
            ManagerError: What `load_model` raises; `ModelLoadingError` and
                `ModelAlreadyLoadedError` only where the configuration is another one, or the model
                is being unloaded.
        """
        config.validate()
        async with self.lock:
            match self.models.get(config.model_id):
                case AsyncManagedModel(status=ModelStatus.READY) as ready if ready.config == config:
                    return True
                case LoadingPlaceholder() as placeholder if placeholder.config == config:
                    pass
                case _:
                    self._refuse_if_taken(config.model_id)
                    placeholder = self._start_load(config)
        return await self._wait_for_load(placeholder)

    def _refuse_if_taken(self, model_id: str) -> None:
        """Raise if what is in the model's place may not be replaced by a load."""
        entry = self.models.get(model_id)
        if isinstance(entry, LoadingPlaceholder):
            raise ModelLoadingError(f"model {model_id!r} is being loaded already")
        if isinstance(entry, AsyncManagedModel):
            raise ModelAlreadyLoadedError(f"model {model_id!r} is there already, {entry.status}")

    def _refuse_if_full(self, model_id: str) -> None:
        """Raise if one more model would be one too many."""
        others = [
            entry.model_id
            for entry in self.models.values()
            if entry.status is not ModelStatus.FAILED and entry.model_id != model_id
        ]
        if len(others) >= self.max_models:
            raise InsufficientResourcesError(
                f"model {model_id!r} would be one too many: max_models is {self.max_models}, and"
                f" there are {', '.join(others)}; unload one"
            )

    def _start_load(self, config: ModelConfig) -> LoadingPlaceholder:
        """Take the model's place in the table, and start the task that owns the load."""
        self._refuse_if_closed()
        self._refuse_if_full(config.model_id)
        placeholder = LoadingPlaceholder(
            config.model_id, config, generation=next(self._generations)
        )
        self._move(placeholder, ModelStatus.LOADING, "a load was asked for")
        self._own(self._load(placeholder), f"load of model {config.model_id}")
        return placeholder

    async def _wait_for_load(self, placeholder: LoadingPlaceholder) -> bool:
        """Wait for the end of a load, and raise if it failed."""
        outcome = await placeholder.outcome()
        if isinstance(outcome, FailedEntry):
            raise outcome.load_error()
        return True

    async def _load(self, placeholder: LoadingPlaceholder) -> None:
        """Own a load: every way out of here settles the placeholder."""
        config, progress = placeholder.config, placeholder.progress
        try:
            estimate, memory = await self._work(placeholder, self._appraise, config)
            await self._reserve(placeholder, estimate, memory)
            loaded = await self._work(placeholder, run_load, self.loader, config, progress)
            await self._make_ready(placeholder, loaded, estimate)
        except BaseException as error:
            self._make_failed(placeholder, error)
            if not isinstance(error, Exception):
                raise

    async def _work(self, placeholder: LoadingPlaceholder, fn: Callable[..., T], *args: Any) -> T:
        """Run one step of a load in a worker thread."""
        future = self.executor.submit(fn, *args)
        placeholder.work = future
        return await asyncio.wrap_future(future)

    def _appraise(self, config: ModelConfig) -> tuple[MemoryEstimate, Memory]:
        """Return what a load will need, and what there is; in a worker thread, as it may take long.

        The capacity is looked up as well, so that it is known when the lock is held.
        """
        with contained(config):
            estimate = self.loader.estimate(config)
            self.resource_manager.capacity(config.device)
            return estimate, self.resource_manager.memory(config.device)

    async def _reserve(
        self, placeholder: LoadingPlaceholder, estimate: MemoryEstimate, memory: Memory
    ) -> None:
        """Have the memory of the load's worst moment promised to it."""
        placeholder.progress.enter(LoadPhase.WAITING_FOR_MEMORY)
        placeholder.progress(0, estimate.steady_bytes)
        async with self.lock:
            placeholder.reservation = self.resource_manager.reserve(
                placeholder.model_id, estimate.peak_bytes, placeholder.config.device, memory
            )

    async def _make_ready(
        self, placeholder: LoadingPlaceholder, loaded: LoadedModel, estimate: MemoryEstimate
    ) -> None:
        """Put the model in the place that was held for it, with the memory that it really takes.

        Raises:
            ManagerError: The load was told to stop, or was given up and the place is another's:
                a thread that comes late never overwrites a newer entry.
        """
        async with self.lock:
            placeholder.progress.check()
            if not self._is_current(placeholder):
                raise LoadCancelledError("the load was given up before it ended")
            managed = AsyncManagedModel(
                placeholder.model_id,
                loaded.model,
                placeholder.config,
                generation=placeholder.generation,
                reservation=placeholder.reservation,
                resident_bytes=loaded.resident_bytes or 0,
            )
            _settle_reservation(placeholder, loaded, estimate)
            self._move(managed, ModelStatus.READY, "loaded")
            placeholder.settle(managed)

    def _make_failed(self, placeholder: LoadingPlaceholder, error: BaseException) -> None:
        """Put the reason in the place that was held for the model.

        Synchronous, and without the lock, so that a task that is being cancelled gets through:
        nobody holds the lock while another task runs, so that one step needs none.  A thread that
        is still at the load is asked to stop.
        """
        cause = error if isinstance(error, Exception) else placeholder.cancellation()
        placeholder.progress.stop(LoadCancelledError("the load was given up before it ended"))
        _give_back(placeholder)
        if self._is_current(placeholder):
            failed = FailedEntry(placeholder, cause)
            self._move(failed, ModelStatus.FAILED, failed.reason)
            placeholder.settle(failed)

    def _is_current(self, placeholder: LoadingPlaceholder) -> bool:
        """Whether the place in the table is still the one that this load took."""
        return self.models.get(placeholder.model_id) is placeholder

    # --- Using -----------------------------------------------------------------------------

    async def get_model(self, model_id: str) -> AsyncManagedModel | None:
        """Return a model that is ready, and `None` while it is being loaded.

        What is returned is not counted as in use: `use` is for that.

        Raises:
            ModelNotFoundError: (a `KeyError`) There is no such model.
            ModelFailedError: (a `RuntimeError`) Loading it failed; the message has the reason.
            ModelUnloadingError: (a `RuntimeError`) It is being unloaded.
            ManagerClosedError: (a `RuntimeError`) The manager shuts down.
        """
        self._refuse_if_closed()
        if isinstance(self._entry(model_id), LoadingPlaceholder):
            return None
        return self._usable(model_id)

    @asynccontextmanager
    async def use(self, model_id: str) -> AsyncIterator[AsyncManagedModel]:
        """Lend a model out: within the block it is not unloaded.

        Raises:
            ModelLoadingError: (a `ValueError`) It is being loaded.
            ManagerError: What `get_model` raises.
        """
        managed = self._usable(model_id)  # no await from here to `acquire`: nothing comes between
        managed.acquire()
        try:
            yield managed
        finally:
            managed.release()

    async def infer(self, model_id: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run a model's forward in its thread, without gradients.

        Raises:
            Exception: What `use` raises, and what the forward raises.
        """
        async with self.use(model_id) as managed:
            return await managed(*args, **kwargs)

    def _usable(self, model_id: str) -> AsyncManagedModel:
        """Return a model that is ready, or raise why it is not."""
        self._refuse_if_closed()
        match self._entry(model_id):
            case LoadingPlaceholder():
                raise ModelLoadingError(f"model {model_id!r} is being loaded")
            case FailedEntry() as failed:
                raise failed.error()
            case AsyncManagedModel(status=ModelStatus.UNLOADING):
                raise ModelUnloadingError(f"model {model_id!r} is being unloaded")
            case managed:
                return managed

    # --- Looking ---------------------------------------------------------------------------

    async def list_models(self) -> list[ModelInfo]:
        """Return a snapshot of every model, in the order in which they were asked for."""
        return [entry.info() for entry in self.models.values()]

    async def get_model_info(self, model_id: str) -> ModelInfo:
        """Return a snapshot of one model, whatever its state.

        Raises:
            ModelNotFoundError: (a `KeyError`) There is no such model.
        """
        return self._entry(model_id).info()

    def _entry(self, model_id: str) -> Entry:
        """Return the entry of a model."""
        try:
            return self.models[model_id]
        except KeyError:
            names = ", ".join(self.models) or "none"
            message = f"there is no model {model_id!r}; there are: {names}"
            raise ModelNotFoundError(message) from None

    # --- Unloading -------------------------------------------------------------------------

    async def unload_model(self, model_id: str, drain_timeout: float | None = None) -> bool:
        """Unload a model once its uses in flight have ended, and return `True` when it is gone.

        From now on it takes no new use.  The unload belongs to the manager: a caller that is
        cancelled, or whose deadline comes, goes away alone, and the unload ends when the last use
        does.  A second caller joins.  An entry that failed is removed at once.

        Args:
            model_id: Which model.
            drain_timeout: Seconds to wait for uses in flight; 20 by default, `math.inf` for ever.

        Raises:
            DrainTimeoutError: (a `TimeoutError`) Uses were still in flight at the deadline.
            ModelNotFoundError: (a `KeyError`) There is no such model.
            ModelLoadingError: (a `ValueError`) It is being loaded.
            ValueError: `drain_timeout` is negative or not a number.
        """
        seconds = _check_timeout(drain_timeout)
        async with self.lock:
            entry = self._entry(model_id)
            if isinstance(entry, LoadingPlaceholder):
                raise ModelLoadingError(f"model {model_id!r} is being loaded")
            if isinstance(entry, FailedEntry):
                self._move(entry, ABSENT, "an unload was asked for")
                return True
            if entry.status is ModelStatus.READY:
                self._start_unload(entry, "an unload was asked for")
        return await self._wait_for_unload(entry, seconds)

    def _start_unload(self, managed: AsyncManagedModel, reason: str) -> None:
        """Refuse new uses, and start the task that owns the unload."""
        self._move(managed, ModelStatus.UNLOADING, reason)
        self._own(self._unload(managed), f"unload of model {managed.model_id}")

    async def _wait_for_unload(self, managed: AsyncManagedModel, seconds: float | None) -> bool:
        """Wait for the end of an unload, and raise if the deadline comes before."""
        try:
            async with asyncio.timeout(seconds):
                await managed.gone()
        except TimeoutError:
            raise DrainTimeoutError(
                f"model {managed.model_id!r} still has {managed.in_flight} use(s) in flight after"
                f" {seconds:g} s; the unload ends when they do"
            ) from None
        return True

    async def _unload(self, managed: AsyncManagedModel) -> None:
        """Own an unload: every way out of here removes the entry."""
        try:
            await managed.idle()
            await asyncio.shield(asyncio.wrap_future(managed.close()))
        finally:
            managed.close().add_done_callback(partial(_release, managed.reservation))
            self._move(managed, ABSENT, "unloaded")
            managed.mark_gone()

    # --- Shutting down ---------------------------------------------------------------------

    async def shutdown(self, drain_timeout: float | None = None) -> None:
        """End it all: refuse new work, ask running loads to stop, unload everything.

        What has not ended after the deadline is given up: its entry goes, and its thread, which
        nothing can end, is left behind; it does not keep the process from exiting.  A second call
        joins the first; a caller that is cancelled goes away alone.

        Args:
            drain_timeout: Seconds for loads and uses in flight to end; 20 by default, `math.inf`
                for ever.

        Raises:
            ValueError: `drain_timeout` is negative or not a number.
        """
        seconds = _check_timeout(drain_timeout)
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(seconds), name="manager shutdown")
        await asyncio.shield(self._closing)

    async def _close(self, seconds: float | None) -> None:
        """Own the shutdown."""
        async with self.lock:
            for entry in list(self.models.values()):
                self._dismiss(entry)
        await self._end_owners(seconds)
        for entry in list(self.models.values()):  # what failed is left
            self._move(entry, ABSENT, "the manager shut down")
        self.executor.shutdown(wait=False)

    def _dismiss(self, entry: Entry) -> None:
        """Ask whoever owns an entry to end."""
        if isinstance(entry, LoadingPlaceholder):
            entry.progress.stop(ManagerClosedError("the manager shut down during the load"))
        elif isinstance(entry, AsyncManagedModel) and entry.status is ModelStatus.READY:
            self._start_unload(entry, "the manager shuts down")

    async def _end_owners(self, seconds: float | None) -> None:
        """Wait for loads and unloads to end, and give those up that do not."""
        if not self._owners:
            return
        _, late = await asyncio.wait(self._owners, timeout=seconds)
        for task in late:
            logger.warning("gave up the %s after %g s", task.get_name(), seconds)
            task.cancel()
        if late:
            await asyncio.wait(late)

    def _refuse_if_closed(self) -> None:
        """Raise if the manager shuts down, or has."""
        if self._closing is not None:
            raise ManagerClosedError("the manager is shut down, and takes no more work")

    # --- The table -------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task that owns an entry, and keep it until it ends."""
        task = asyncio.create_task(work, name=name)
        self._owners.add(task)
        task.add_done_callback(self._owners.discard)

    def _move(self, entry: Entry, to: State, reason: str) -> None:
        """Make one move in the table; nothing else changes it.

        Raises:
            IllegalTransitionError: The table of states has no such move; nothing was changed.
        """
        before = self.models.get(entry.model_id)
        old, since = (before.status, before.since) if before is not None else (ABSENT, None)
        transition(old, to)
        now = time.monotonic()
        if to is ABSENT:
            del self.models[entry.model_id]
        else:
            entry.status, entry.since = to, now
            self.models[entry.model_id] = entry
        elapsed = 0.0 if since is None else now - since
        self._tell(
            TransitionEvent(entry.model_id, entry.generation, old, to, reason, elapsed, time.time())
        )

    def _tell(self, event: TransitionEvent) -> None:
        """Tell every observer; one that fails does not stop the others, or the move."""
        for observer in tuple(self.on_transition):
            try:
                observer(event)
            except Exception:
                logger.exception("an observer of transitions failed")


def _configure_threads(single_threaded: bool, num_threads: int | None) -> None:
    """Set torch's threads, if that is asked for."""
    if single_threaded or num_threads is not None:
        from splitlearn_core.utils.threads import configure_pytorch_threads  # noqa: PLC0415

        configure_pytorch_threads(single_threaded, num_threads)


def _settle_reservation(
    placeholder: LoadingPlaceholder, loaded: LoadedModel, estimate: MemoryEstimate
) -> None:
    """Let the measured size of a model replace the estimate of its load."""
    if placeholder.reservation is None:
        return
    measured = loaded.resident_bytes
    size = estimate.steady_bytes if measured is None else measured
    if short := placeholder.reservation.resize(size):
        logger.warning(
            "model %s takes %d bytes, which is %d more than could be reserved for it",
            placeholder.model_id,
            size,
            short,
        )


def _give_back(placeholder: LoadingPlaceholder) -> None:
    """Release what a failed load has: now, or when a thread that is still at it has ended."""
    if placeholder.work is not None:
        placeholder.work.cancel()
        placeholder.work.add_done_callback(partial(_discard, placeholder.reservation))


def _discard(reservation: Reservation | None, work: Future[Any]) -> None:
    """Close a model that nobody waits for any more, and release its memory."""
    if not work.cancelled() and work.exception() is None and isinstance(work.result(), LoadedModel):
        close_model(work.result().model)
    _release(reservation, work)


def _release(reservation: Reservation | None, _: Future[Any]) -> None:
    """Release memory, where some was promised."""
    if reservation is not None:
        reservation.release()


def _check_timeout(seconds: float | None) -> float | None:
    """Return a time limit as asyncio has it: `None` is for ever; given `None`, the usual one."""
    if seconds is None:
        return DRAIN_TIMEOUT
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"a timeout must be 0 seconds or more, found {seconds!r}")
    return None if math.isinf(seconds) else seconds
