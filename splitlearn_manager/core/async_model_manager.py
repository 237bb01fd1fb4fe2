"""`AsyncModelManager`: owns models over time.

It reads in the order of a model's life: load, use, look at, unload; then the manager's own end.
What it decides is here; how it is done is in the files beside it: `table` (every state, one
writer), `loads` and `unloads` (their owners), `admission` (memory), `idle` (what may go).

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
import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from splitlearn_core.machine import keep_freed_blocks
from splitlearn_manager.core.admission import Admission
from splitlearn_manager.core.doorbell import in_loop
from splitlearn_manager.core.entries import AsyncManagedModel, FailedEntry, LoadingPlaceholder
from splitlearn_manager.core.executor import DaemonThreadPoolExecutor
from splitlearn_manager.core.idle import IdleModels
from splitlearn_manager.core.lease import Use
from splitlearn_manager.core.loads import LoadPolicy, Loads
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.core.owners import Owners
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.states import ABSENT, ModelStatus
from splitlearn_manager.core.table import ModelTable
from splitlearn_manager.core.unloads import DRAIN_TIMEOUT, GRACE, Unloads, check_timeout
from splitlearn_manager.errors import (
    InsufficientResourcesError,
    LoadCancelledError,
    ManagerClosedError,
    ManagerError,
    ModelAlreadyLoadedError,
    ModelLoadingError,
    ModelNotLoadingError,
    ModelUnloadingError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.core.entries import Entry
    from splitlearn_manager.core.event_bus import Subscription
    from splitlearn_manager.core.events import Event, FailedReloadObserver, TransitionObserver
    from splitlearn_manager.core.model_info import ModelInfo
    from splitlearn_manager.core.model_loader import Loader

logger = logging.getLogger(__name__)

MEMORY_PATIENCE = 300.0
"""Seconds for which a load waits for memory that is being given back."""

_CUT_TIME = 1.0
"""Seconds after the deadline of a shutdown for uses that were ended to go."""


class ReloadPolicy(StrEnum):
    """What a reload does first."""

    LOAD_FIRST = "load_first"
    """Load the new beside the old and swap: no gap, and a failed reload changes nothing, but both
    must fit at once."""
    UNLOAD_FIRST = "unload_first"
    """Unload the old, then load the new: for models that don't fit twice.  Meanwhile there is none,
    and a failed reload leaves none."""


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
        eviction: Unload idle models, the least recently used first, when a load needs their place
            or their memory.
        load_policy: When loads are given up, and when they are tried again.
        memory_patience: Seconds for which a load waits for memory that is being given back.
        unload_grace: Seconds that uses which were ended are given to go, and then a model's thread
            to end, before an unload says what is not back.

    Attributes:
        models: The table: one entry for each model.  To be changed by the manager alone.
        on_transition: Called with every `TransitionEvent`, in order; the first one logs it.
        on_failed_reload: Likewise, with every `ReloadFailedEvent`.

    Making a manager imports torch and sets its threads, once, before any of them runs; with
    `single_threaded=False` and no `num_threads` it does neither.  It also has the C library keep
    what forwards free for the next ones (`splitlearn_core.machine.keep_freed_blocks`).
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
        eviction: bool = False,
        load_policy: LoadPolicy | None = None,
        memory_patience: float = MEMORY_PATIENCE,
        unload_grace: float = GRACE,
    ) -> None:
        if max_models < 1:
            raise ValueError(f"max_models must be at least 1, found {max_models}")
        keep_freed_blocks()  # first: threads that start have an arena of their own
        _configure_threads(single_threaded, num_threads)
        self.resource_manager = ResourceManager() if resource_manager is None else resource_manager
        self.max_models = max_models
        self.loader: Loader = ModelLoader() if loader is None else loader
        self.executor = DaemonThreadPoolExecutor(max_workers, "splitlearn-loader")
        self.lock = asyncio.Lock()
        self._table = ModelTable()
        self._owners = Owners()
        self._unloads = Unloads(self._table, self._owners, unload_grace)
        self._idle = IdleModels(self._table, self._unloads, evicts=eviction)
        self._admission = Admission(self.resource_manager, self.lock, self._idle, memory_patience)
        self._loads = self._make_loads(load_policy or LoadPolicy())
        self._takes_loads = True
        self._closing: asyncio.Task[None] | None = None

    def _make_loads(self, policy: LoadPolicy) -> Loads:
        """Return the loads, with their way to memory."""
        return Loads(
            self._table,
            self.lock,
            self._owners,
            self.executor,
            self.loader,
            self.resource_manager,
            self._admission,
            policy,
            replaced=lambda old: self._unloads.start(old, "replaced by a reload", DRAIN_TIMEOUT),
            became_ready=self._idle.watch,
        )

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

    @property
    def models(self) -> dict[str, Entry]:
        """The table: one entry for each model.  To be changed by the manager alone."""
        return self._table.models

    @property
    def on_transition(self) -> list[TransitionObserver]:
        """Called with every `TransitionEvent`, in order; the first one logs it."""
        return self._table.on_transition

    @property
    def on_failed_reload(self) -> list[FailedReloadObserver]:
        """Called with every `ReloadFailedEvent`, in order; the first one logs it."""
        return self._table.on_failed_reload

    # --- Loading ---------------------------------------------------------------------------

    async def load_model(self, config: ModelConfig) -> bool:
        """Load a model, and return `True` when it is ready.

        The load belongs to the manager: if the caller is cancelled or times out, it goes on, and
        ends in a ready or a failed model all the same; `cancel_load` ends it.

        Raises:
            ConfigError: (a `ValueError`) The configuration is wrong; nothing was changed.
            ModelAlreadyLoadedError: (a `ValueError`) A model with that id is loaded.
            ModelLoadingError: (a `ValueError`) One is being loaded.
            InsufficientResourcesError: (a `RuntimeError`) It does not fit.
            LoadCancelledError: (a `RuntimeError`) `cancel_load` ended it.
            LoadTimeoutError: (a `TimeoutError`) It hung, and was given up.
            ModelFailedError: (a `RuntimeError`) Loading failed; `__cause__` is the loader's error.
            ManagerClosedError: (a `RuntimeError`) The manager shuts down.
        """
        return await _wait_for(await self.start_load(config))

    async def start_load(self, config: ModelConfig) -> LoadingPlaceholder:
        """Begin what `load_model` waits for; its `outcome()` can be awaited.

        Raises:
            ManagerError: What `load_model` raises before a load has begun.
        """
        config.validate()
        async with self.lock:
            self._refuse_if_taken(config.model_id)
            return self._begin(config, "a load was asked for")

    async def ensure_model(self, config: ModelConfig) -> bool:
        """Return `True` when the model is ready, loading it if nobody has.

        A load in flight with an equal configuration is joined; a model that is ready with an
        equal configuration is left as it is.

        Raises:
            ManagerError: What `load_model` raises; `ModelLoadingError` and
                `ModelAlreadyLoadedError` only where the configuration is another one, or the model
                is being unloaded.
        """
        placeholder = await self.start_ensure(config)
        return True if placeholder is None else await _wait_for(placeholder)

    async def start_ensure(self, config: ModelConfig) -> LoadingPlaceholder | None:
        """Begin, or join, what `ensure_model` waits for; `None` where the model is ready.

        Raises:
            ManagerError: What `ensure_model` raises before it waits.
        """
        config.validate()
        async with self.lock:
            self._refuse_if_closed()
            under_way = self._table.load_under_way(config.model_id)
            match self.models.get(config.model_id):
                case AsyncManagedModel(status=ModelStatus.READY) as ready if ready.config == config:
                    return None
                case _ if under_way is not None and under_way.config == config:
                    return under_way
                case _:
                    self._refuse_if_taken(config.model_id)
                    return self._begin(config, "a load was asked for")

    async def cancel_load(self, model_id: str, grace: float = 5.0) -> bool:
        """End the load, or the reload, of a model that is under way.

        It ends at once for those who wait for it, with `LoadCancelledError`; its thread ends at its
        next report, between two tensors or two pieces of a file.  A load leaves a failed entry with
        that as its reason, a reload leaves the model as it was.

        Args:
            model_id: Which model.
            grace: Seconds to wait for the thread.

        Returns:
            Whether the thread has ended, so that nothing of the load is left.  What it reserved
            stays reserved until it has.

        Raises:
            ModelNotFoundError: (a `KeyError`) There is no such model.
            ModelNotLoadingError: (a `ValueError`) No load of it is under way.
            ValueError: `grace` is negative or not a number.
        """
        seconds = check_timeout(grace)
        async with self.lock:
            entry = self._table.entry(model_id)
            placeholder = self._table.load_under_way(model_id)
            if placeholder is None:
                raise ModelNotLoadingError(
                    f"no load of model {model_id!r} is under way: it is {entry.status}"
                )
            self._loads.cancel(
                placeholder, LoadCancelledError(f"the load of model {model_id!r} was cancelled")
            )
        await placeholder.outcome()
        if placeholder.remains is None or placeholder.remains.done():
            return True
        done, _ = await asyncio.wait({in_loop(placeholder.remains)}, timeout=seconds)
        return bool(done)

    def _begin(self, config: ModelConfig, reason: str) -> LoadingPlaceholder:
        """Begin a load in a free place."""
        self._refuse_loads_if_closed()
        self._refuse_if_full(config.model_id)
        return self._loads.start(config, reason)

    def _refuse_if_taken(self, model_id: str) -> None:
        """Raise if what is in the model's place may not be replaced by a load."""
        entry = self.models.get(model_id)
        if isinstance(entry, LoadingPlaceholder):
            raise ModelLoadingError(f"model {model_id!r} is being loaded already")
        if isinstance(entry, AsyncManagedModel):
            raise ModelAlreadyLoadedError(f"model {model_id!r} is there already, {entry.status}")

    def _refuse_if_full(self, model_id: str) -> None:
        """Raise if one more model would be one too many, and none can be evicted."""
        others = [
            entry.model_id
            for entry in self.models.values()
            if entry.status is not ModelStatus.FAILED
            and entry.model_id != model_id
            and not (isinstance(entry, AsyncManagedModel) and entry.evicted)
        ]
        excess = len(others) + 1 - self.max_models
        if excess > 0 and not self._idle.evict_places(model_id, excess):
            raise InsufficientResourcesError(
                f"model {model_id!r} would be one too many: max_models is {self.max_models}, and"
                f" there are {', '.join(others)}; unload one"
            )

    # --- Reloading -------------------------------------------------------------------------

    async def reload_model(
        self, config: ModelConfig, policy: ReloadPolicy | str = ReloadPolicy.LOAD_FIRST
    ) -> bool:
        """Load a model anew, and return `True` when the new one is in use.

        The swap falls between two requests: one that has begun ends on the old model, the next one
        gets the new.  The old one is then drained, and counts until it is gone.

        Args:
            config: The new configuration, which may be the same as the old.
            policy: What to do first; `unload_first` where both don't fit at once.

        Raises:
            ConfigError: (a `ValueError`) The configuration is wrong; nothing was changed.
            ModelNotFoundError: (a `KeyError`) There is no such model.
            ModelLoadingError: (a `ValueError`) It is being loaded, or reloaded, already.
            ModelUnloadingError: (a `RuntimeError`) It is being unloaded.
            ManagerError: What `load_model` raises.  With `load_first` the old model is as it was,
                with `unload_first` it is gone.
        """
        begun = await self.start_reload(config, policy)
        return await _wait_for(await asyncio.shield(begun))

    async def start_reload(
        self, config: ModelConfig, policy: ReloadPolicy | str = ReloadPolicy.LOAD_FIRST
    ) -> asyncio.Future[LoadingPlaceholder]:
        """Begin what `reload_model` waits for.

        Returns:
            A future of the load, whose `outcome()` can be awaited; with `unload_first` it comes
            when the old model is gone.

        Raises:
            ManagerError: What `reload_model` raises before anything has begun.
        """
        config.validate()
        chosen = _check_policy(policy)
        async with self.lock:
            return self._start_reload(config, chosen)

    def _start_reload(
        self, config: ModelConfig, policy: ReloadPolicy
    ) -> asyncio.Future[LoadingPlaceholder]:
        """Begin a reload; return its load, which comes later where the unload comes first."""
        self._refuse_loads_if_closed()
        begun: asyncio.Future[LoadingPlaceholder] = asyncio.get_running_loop().create_future()
        match self._table.entry(config.model_id):
            case FailedEntry():
                begun.set_result(self._begin(config, "a reload was asked for"))
            case LoadingPlaceholder():
                raise ModelLoadingError(f"model {config.model_id!r} is being loaded")
            case AsyncManagedModel(status=ModelStatus.READY) as managed:
                self._refuse_if_reloading(config.model_id)
                if policy is ReloadPolicy.LOAD_FIRST:
                    begun.set_result(self._loads.start_successor(config))
                else:
                    reason = "a reload was asked for, unload first"
                    self._unloads.start(managed, reason, DRAIN_TIMEOUT)
                    work = self._load_after(managed, config, begun)
                    self._owners.own(work, f"reload of model {config.model_id}")
            case _:
                raise ModelUnloadingError(f"model {config.model_id!r} is being unloaded")
        return begun

    async def _load_after(
        self,
        managed: AsyncManagedModel,
        config: ModelConfig,
        begun: asyncio.Future[LoadingPlaceholder],
    ) -> None:
        """Own what is between the unload and the load of a reload that unloads first."""
        begun.add_done_callback(_look_at)
        try:
            await managed.gone()
            async with self.lock:
                self._refuse_if_taken(config.model_id)
                placeholder = self._begin(config, "reloading, the old one is unloaded")
            _settle(begun, placeholder)
        except ManagerError as error:
            _settle(begun, error)
        except asyncio.CancelledError:
            message = f"the manager shut down before model {config.model_id!r} was gone"
            _settle(begun, ManagerClosedError(message))

    def _refuse_if_reloading(self, model_id: str) -> None:
        """Raise if a reload of the model is under way."""
        if model_id in self._table.successors:
            raise ModelLoadingError(
                f"model {model_id!r} is being reloaded; wait for that, or cancel it"
            )

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
        if isinstance(self._table.entry(model_id), LoadingPlaceholder):
            return None
        return self._usable(model_id)

    def use(self, model_id: str) -> Use:
        """Lend a model to a block: `async with manager.use("trunk") as model`.

        Within the block it is not unloaded; if it must be, and the block has not ended at the
        deadline of the drain, the block is cancelled, and raises `DrainTimeoutError`.

        Raises:
            ModelLoadingError: (a `ValueError`) On entering: it is being loaded.
            ManagerError: On entering: what `get_model` raises.
        """
        return Use(lambda: self._usable(model_id))

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
        match self._table.entry(model_id):
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
        return [self._table.info(model_id) for model_id in self.models]

    async def get_model_info(self, model_id: str) -> ModelInfo:
        """Return a snapshot of one model, whatever its state.

        Raises:
            ModelNotFoundError: (a `KeyError`) There is no such model.
        """
        return self._table.info(model_id)

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens from now on: every transition, and how far loads are.

        Ends when the manager is shut down.  A reader that is too slow gets an `EventsLostEvent`
        in place of what it missed; it never holds up the manager.
        """
        with self.subscribe() as events:
            async for event in events:
                yield event

    def subscribe(self, after: str | None = None) -> Subscription:
        """Return a place in the stream of events, to be entered: what `events` reads from.

            with manager.subscribe() as events:
                async for event in events:
                    ...

        It has its own queue of bounded length, and waiting for its next event can be cancelled
        without losing one.

        Args:
            after: The `position` of an earlier one, to go on there.  Where what came since is not
                there any more, the first event is an `EventsLostEvent`.
        """
        return self._table.bus.subscribe(after=after)

    async def check_alive(self, seconds: float = 5.0) -> None:
        """Return if the manager can still decide things; health checks go through here.

        Raises:
            TimeoutError: Whoever holds the lock has not let go of it in time.
        """
        async with asyncio.timeout(seconds), self.lock:
            pass

    # --- Changing --------------------------------------------------------------------------

    async def adopt_config(self, config: ModelConfig) -> None:
        """Let a model go on with a configuration that it need not be loaded again for.

        It may differ in what `ModelConfig.loads_like` leaves out: time to live, pinned, ….

        Raises:
            ModelNotFoundError: (a `KeyError`) There is no such model.
            ValueError: It differs in more than that; `reload_model` is for this.
        """
        async with self.lock:
            entry = self._table.entry(config.model_id)
            if not config.loads_like(entry.config):
                raise ValueError(f"model {config.model_id!r} must be loaded again for that")
            entry.config = config
            successor = self._table.successors.get(config.model_id)
            if successor is not None and config.loads_like(successor.config):
                successor.config = config
            if isinstance(entry, AsyncManagedModel) and entry.status is ModelStatus.READY:
                self._idle.watch(entry)

    def set_limits(
        self,
        *,
        max_models: int,
        memory_limit: int | None,
        eviction: bool,
        load_policy: LoadPolicy,
        memory_patience: float,
    ) -> None:
        """Change limits, as the arguments of the manager have them, from the next load on.

        Nothing that is loaded or being loaded has to go: what is above a lower limit stays until it
        is unloaded, and keeps others out.
        """
        if max_models < 1:
            raise ValueError(f"max_models must be at least 1, found {max_models}")
        self.max_models = max_models
        self._idle.evicts = eviction
        self._loads.policy = load_policy
        self._admission.patience = memory_patience
        self.resource_manager.set_memory_limit(memory_limit)

    # --- Unloading -------------------------------------------------------------------------

    async def unload_model(self, model_id: str, drain_timeout: float | None = None) -> bool:
        """Unload a model, and return when it is gone and its memory is back.

        From now on it takes no new use.  Uses in flight are given until the deadline; what is left
        then is ended, and raises `DrainTimeoutError` where it is.  The unload belongs to the
        manager: a caller that is cancelled goes away alone.  A second caller joins, and can only
        bring the deadline nearer.  An entry that failed is removed at once.

        Args:
            model_id: Which model.
            drain_timeout: Seconds for uses in flight; 20 by default, `math.inf` for ever.

        Returns:
            Whether all of its memory is back.  If not, because a forward hangs or something else
            still refers to the model, the log and the event say how much is missing; it stays
            reserved until it is free.

        Raises:
            ModelNotFoundError: (a `KeyError`) There is no such model.
            ModelLoadingError: (a `ValueError`) It is being loaded or reloaded: `cancel_load`.
            ValueError: `drain_timeout` is negative or not a number.
        """
        going = await self.start_unload(model_id, drain_timeout)
        if going is None:
            return True
        await going.gone()
        return going.unreturned_bytes == 0

    async def start_unload(
        self, model_id: str, drain_timeout: float | None = None
    ) -> AsyncManagedModel | None:
        """Begin, or join, what `unload_model` waits for.

        Returns:
            The model that goes, whose `gone()` can be awaited; `None` for an entry that failed,
            which is removed by now.

        Raises:
            ManagerError: What `unload_model` raises.
            ValueError: Likewise.
        """
        seconds = check_timeout(drain_timeout)
        async with self.lock:
            entry = self._table.entry(model_id)
            if isinstance(entry, LoadingPlaceholder):
                raise ModelLoadingError(f"model {model_id!r} is being loaded; cancel that first")
            if isinstance(entry, FailedEntry):
                self._table.move(entry, ABSENT, "an unload was asked for")
                return None
            if entry.status is ModelStatus.READY:
                self._refuse_if_reloading(model_id)
                self._unloads.start(entry, "an unload was asked for", seconds)
            elif entry.drain is not None:
                entry.drain.shorten(seconds)
            return entry

    # --- Shutting down ---------------------------------------------------------------------

    async def stop_loading(self) -> None:
        """Take no more loads, and end those under way; what is loaded goes on serving.

        The first step of a shutdown that lets what is in flight end before models go.
        """
        async with self.lock:
            self._takes_loads = False
            for entry in self._table.everything():
                if isinstance(entry, LoadingPlaceholder):
                    self._dismiss(entry, None)

    async def shutdown(self, drain_timeout: float | None = None) -> None:
        """End it all: refuse new work, end running loads, unload everything.

        Loads end at once; their threads, which nothing can end, are waited for a second, and then
        left behind, as is what has not ended at the deadline.  Such a thread does not keep the
        process from exiting.  A second call joins the first; a caller that is cancelled goes away
        alone.

        Args:
            drain_timeout: Seconds for uses in flight to end; 20 by default, `math.inf` for ever.

        Raises:
            ValueError: `drain_timeout` is negative or not a number.
        """
        seconds = check_timeout(drain_timeout)
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(seconds), name="manager shutdown")
        await asyncio.shield(self._closing)

    async def _close(self, seconds: float | None) -> None:
        """Own the shutdown."""
        async with self.lock:
            self._idle.close()
            for entry in self._table.everything():
                self._dismiss(entry, seconds)
        await self._owners.end(None if seconds is None else seconds + _CUT_TIME)
        for entry in list(self.models.values()):  # what failed is left
            self._table.move(entry, ABSENT, "the manager shut down")
        self.executor.shutdown(wait=False)
        self._table.bus.close()

    def _dismiss(self, entry: Entry, seconds: float | None) -> None:
        """Ask whoever owns an entry to end."""
        if isinstance(entry, LoadingPlaceholder):
            error = ManagerClosedError("the manager shut down during the load")
            self._loads.cancel(entry, error)
        elif isinstance(entry, AsyncManagedModel):
            if entry.status is ModelStatus.READY:
                self._unloads.start(entry, "the manager shuts down", seconds)
            elif entry.drain is not None:
                entry.drain.shorten(seconds)

    def _refuse_if_closed(self) -> None:
        """Raise if the manager shuts down, or has."""
        if self._closing is not None:
            raise ManagerClosedError("the manager is shut down, and takes no more work")

    def _refuse_loads_if_closed(self) -> None:
        """Raise if the manager takes no more loads."""
        self._refuse_if_closed()
        if not self._takes_loads:
            raise ManagerClosedError("the manager is shutting down, and takes no more loads")


def _configure_threads(single_threaded: bool, num_threads: int | None) -> None:
    """Set torch's threads, if that is asked for."""
    if single_threaded or num_threads is not None:
        from splitlearn_core.utils.threads import configure_pytorch_threads  # noqa: PLC0415

        configure_pytorch_threads(single_threaded, num_threads)


async def _wait_for(placeholder: LoadingPlaceholder) -> bool:
    """Wait for the end of a load, and raise if it failed."""
    outcome = await placeholder.outcome()
    if isinstance(outcome, FailedEntry):
        raise outcome.load_error()
    return True


def _check_policy(policy: ReloadPolicy | str) -> ReloadPolicy:
    """Return a policy by its name."""
    try:
        return ReloadPolicy(policy)
    except ValueError:
        names = ", ".join(ReloadPolicy)
        raise ValueError(f"a reload's policy is one of {names}, found {policy!r}") from None


def _settle(
    begun: asyncio.Future[LoadingPlaceholder], outcome: LoadingPlaceholder | ManagerError
) -> None:
    """Tell who waits for the beginning of a load; whoever has stopped waiting is not told."""
    if begun.done():
        return
    if isinstance(outcome, ManagerError):
        begun.set_exception(outcome)
    else:
        begun.set_result(outcome)


def _look_at(result: asyncio.Future[Any]) -> None:
    """Note the error of a load that nobody waits for any more, so that asyncio does not."""
    if not result.cancelled():
        result.exception()
