"""One storm: a manager, a sequence of operations, and a look at everything after each."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from lifecycle_storm.loader import FATES, LONGEST_WAIT, Fate, StormLoader
from lifecycle_storm.oracle import Oracle
from lifecycle_storm.watchdog import Watchdog
from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager.config import ModelConfig
from splitlearn_manager.core import async_model_manager, loads
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.deadlines import LoadDeadlines
from splitlearn_manager.core.loads import LoadPolicy
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.retry import RetryPolicy
from splitlearn_manager.core.states import ModelStatus
from splitlearn_manager.errors import DrainTimeoutError, ManagerError
from splitlearn_manager.serving.cache_memory import CacheMemory
from splitlearn_manager.serving.errors import NoMemoryError

if TYPE_CHECKING:
    from splitlearn_manager.core.entries import AsyncManagedModel
    from splitlearn_manager.core.lease import Hold

IDS = ("a", "b", "c", "d")
LIMIT = 1000
LONGEST = 20.0
"""Seconds after which an entry that should have left its state counts as stuck."""
BLOCKED = 1.0
"""Seconds in which a loop that does not come round counts as blocked."""

_SPLIT = {"component": "trunk", "split_points": [2, 6]}
_WEIGHTS = {
    "load": 22,
    "ensure": 8,
    "waver": 4,
    "reload": 10,
    "cancel": 6,
    "unload": 8,
    "infer": 14,
    "use": 7,
    "hang": 3,
    "hold": 4,
    "cache": 6,
    "keep": 2,
    "leave": 6,
    "fate": 16,
    "release": 14,
    "look": 3,
    "listen": 1,
}
_SAME = 0.3
"""How often an operation is on the model that the one before was on; …"""
_SUITED = 0.7
_SUITS = {"load": None, "ensure": None, "waver": None, "cancel": ModelStatus.LOADING}
"""… how often it is on one that is in the state that it suits (`ready`, if not named), …"""
_PACES = (0, 0, 1, 2, 5, None, None)
"""… after so many rounds of the loop, or a rest in which threads and timers come to it."""
_REST = 0.006
Trial = tuple[str, str]


def storm(seed: int, number: int, length: int, *, uvloop: bool) -> list[Trial]:
    """Run one storm; return each operation, and what was wrong after it."""
    factory: Any = None
    if uvloop:
        import uvloop as library  # noqa: PLC0415 - the other loop needs none

        factory = library.new_event_loop
    with _hurried(), asyncio.Runner(debug=True, loop_factory=factory) as runner:
        return runner.run(Storm(random.Random(f"{seed}/{number}")).run(length))  # noqa: S311


@contextmanager
def _hurried() -> Iterator[None]:
    """Let the manager look more often than people need it to."""
    before = loads.TICK, async_model_manager._CUT_TIME
    loads.TICK, async_model_manager._CUT_TIME = 0.01, 0.1
    try:
        yield
    finally:
        loads.TICK, async_model_manager._CUT_TIME = before


async def _nap(_: float) -> None:
    await asyncio.sleep(0.003)


class Storm:
    """A manager, and those who want something of it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._last = IDS[0]
        peaks = {model_id: rng.randrange(100, 600) for model_id in IDS}
        sizes = {m: MemoryEstimate(p, p * rng.randrange(4, 10) // 10) for m, p in peaks.items()}
        self._loader = StormLoader(sizes)
        self._manager = self._make_manager()
        self._memory = CacheMemory(self._manager.resource_manager)
        self._oracle = Oracle(self._manager, LONGEST, self._memory)
        self._callers: set[asyncio.Task[Any]] = set()
        self._blocks: list[asyncio.Event] = []
        self._gates: list[threading.Event] = []
        self._holds: list[Hold | _CachingHold] = []
        self._kept: list[Any] = []
        self._trials: list[Trial] = []
        self._wrong: list[str] = []

    def _make_manager(self) -> AsyncModelManager:
        rng = self._rng
        return AsyncModelManager(
            ResourceManager(memory_limit=LIMIT),
            max_models=rng.randrange(1, 5),
            max_workers=rng.randrange(1, 4),
            loader=self._loader,
            single_threaded=False,
            eviction=rng.random() < 0.6,
            load_policy=LoadPolicy(
                LoadDeadlines(stall=0.03, base=0.1, per_gib=0), RetryPolicy(attempts=2), _nap
            ),
            memory_patience=rng.choice([0.02, 0.3]),
            unload_grace=rng.choice([0.0, 0.05]),
        )

    # --- The storm -------------------------------------------------------------------------

    async def run(self, length: int) -> list[Trial]:
        """Do so many operations, shut down, and look at what is left."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: self._wrong.append(f"unhandled: {what}"))
        threads = set(threading.enumerate())
        async with Watchdog(BLOCKED) as watchdog:
            for _ in range(length):
                what = self._step()
                await self._pause()
                self._look_after(what)
            await self._end()
            self._wrong += watchdog.blocked
        self._wrong += _left_threads(threads)
        self._look_after("nothing is left over")
        return self._trials

    async def _pause(self) -> None:
        rounds = self._rng.choice(_PACES)
        if rounds is None:
            await asyncio.sleep(_REST)
        for _ in range(rounds or 0):
            await asyncio.sleep(0)

    def _step(self) -> str:
        """Begin one operation; return what."""
        rng = self._rng
        (operation,) = rng.choices(list(_WEIGHTS), _WEIGHTS.values())
        model_id = self._last = self._choose(operation)
        said: str | None = getattr(self, f"_do_{operation}")(model_id)
        return f"{operation} {model_id}{f' ({said})' if said else ''}"

    def _choose(self, operation: str) -> str:
        """Return a model: the last one again, one that the operation suits, or any."""
        if self._rng.random() < _SAME:
            return self._last
        states: dict[str | None, list[str]] = {None: []}
        for model_id in IDS:
            entry = self._manager.models.get(model_id)
            states.setdefault(None if entry is None else entry.status, []).append(model_id)
        suited = states.get(_SUITS.get(operation, ModelStatus.READY))
        return self._rng.choice(suited if suited and self._rng.random() < _SUITED else IDS)

    def _look_after(self, what: str) -> None:
        wrong = [*self._oracle.check(), *self._wrong]
        self._wrong = []
        self._trials.append((what, "; ".join(wrong)))

    # --- Operations ------------------------------------------------------------------------

    def _do_load(self, model_id: str) -> None:
        config = self._config(model_id)
        self._call("load", model_id, lambda: self._manager.load_model(config), config)

    def _do_waver(self, model_id: str) -> None:
        """Ask for a load, and think better of it before it has taken its first step."""
        self._do_load(model_id)
        self._do_cancel(model_id)

    def _do_ensure(self, model_id: str) -> None:
        config = self._config(model_id)
        self._call("ensure", model_id, lambda: self._manager.ensure_model(config), config)

    def _do_reload(self, model_id: str) -> str:
        config = self._config(model_id)
        policy = self._rng.choice(("load_first", "load_first", "unload_first"))
        self._call("reload", model_id, lambda: self._manager.reload_model(config, policy), config)
        return policy

    def _do_cancel(self, model_id: str) -> None:
        grace = self._rng.choice((0, 0.01, 5))
        self._call("cancel", model_id, lambda: self._manager.cancel_load(model_id, grace))

    def _do_unload(self, model_id: str) -> str:
        seconds = self._rng.choice((0, 0.01, 0.1, None))
        self._call("unload", model_id, lambda: self._manager.unload_model(model_id, seconds))
        return f"{seconds}"

    def _do_infer(self, model_id: str) -> None:
        question = self._rng.random()

        async def ask() -> None:
            answer = await self._manager.infer(model_id, question)
            if answer != question:
                self._wrong.append(f"{model_id} answered {answer} to {question}")

        self._call("infer", model_id, ask)

    def _do_use(self, model_id: str) -> str:
        ends = asyncio.Event()
        heeds = self._rng.random() < 0.8

        async def block() -> None:
            async with self._manager.use(model_id) as managed:
                while not ends.is_set():
                    try:
                        await ends.wait()
                    except asyncio.CancelledError:
                        if heeds:
                            raise
                    if not managed._cut and managed._model is None:
                        self._wrong.append(f"{model_id} was unloaded under a user")

        self._blocks.append(ends)
        self._call("use", model_id, block)
        return "" if heeds else "and does not let go"

    def _do_hang(self, model_id: str) -> None:
        gate = threading.Event()

        async def forward() -> None:
            async with self._manager.use(model_id) as managed:
                await managed.run(gate.wait, LONGEST_WAIT)

        self._gates.append(gate)
        self._call("hang", model_id, forward)

    def _do_hold(self, model_id: str) -> str:
        at_once = self._rng.random() < 0.5

        async def begin() -> None:
            async with self._manager.use(model_id) as managed:
                holds: list[Hold] = []
                holds.append(managed.hold(lambda _: holds[0].release() if at_once else None))
                self._holds += holds

        self._call("hold", model_id, begin)
        return "lets go at once" if at_once else "lets go later"

    def _do_cache(self, model_id: str) -> str:
        """Open a session, which grows, and gives back what it has when it ends."""
        wanted = [self._rng.randrange(1, 200) for _ in range(self._rng.randrange(1, 4))]

        async def begin() -> None:
            async with self._manager.use(model_id) as managed:
                session = _CachingHold(managed, self._memory)
                self._holds.append(session)
                for nbytes in wanted:
                    session.grow(nbytes)
                    await asyncio.sleep(0)

        self._call("hold", model_id, begin)
        return f"{wanted}"

    def _do_keep(self, model_id: str) -> None:
        """Keep a model beyond its time, or let such a one go."""
        if self._kept and self._rng.random() < 0.6:
            self._kept.pop()
            gc.collect()
        else:
            model = getattr(self._manager.models.get(model_id), "_model", None)
            self._kept += [model] if model is not None else []

    def _do_leave(self, _: str) -> str:
        """Let a caller go away before the end, as one does who is cancelled or timed out."""
        if not self._callers:
            return "nobody"
        caller = self._rng.choice(sorted(self._callers, key=lambda task: task.get_name()))
        caller.cancel()
        return caller.get_name()

    def _do_fate(self, model_id: str) -> str:
        kind = self._rng.choice(FATES)
        self._loader.fates[model_id].append(Fate(kind))
        return kind

    def _do_release(self, _: str) -> str:
        """Let something go on that waits."""
        pools: list[tuple[str, list[Any], Callable[[Any], None]]] = [
            ("a load", self._loader.waiting, lambda fate: fate.gate.set()),
            ("a forward", self._gates, lambda gate: gate.set()),
            ("a block", self._blocks, lambda ends: ends.set()),
            ("a hold", self._holds, lambda hold: hold.release()),
        ]
        waiting = [pool for pool in pools if pool[1]]
        if not waiting:
            return "nothing"
        name, pool, release = self._rng.choice(waiting)
        release(pool.pop(self._rng.randrange(len(pool))))
        return name

    def _do_look(self, model_id: str) -> None:
        async def look() -> None:
            infos = await self._manager.list_models()
            if [i.model_id for i in infos] != list(self._manager.models):
                self._wrong.append("the list is not the table")
            await self._manager.check_alive()
            with suppress(ManagerError):
                await self._manager.get_model_info(model_id)
                await self._manager.get_model(model_id)

        self._call("look", model_id, look)

    def _do_listen(self, _: str) -> None:
        async def listen() -> None:
            last = 0.0
            async for event in self._manager.events():
                if event.at < last - 1.0:
                    self._wrong.append(f"{event} came late")
                last = event.at

        self._call("listen", "", listen)

    # --- Callers ---------------------------------------------------------------------------

    def _config(self, model_id: str) -> ModelConfig:
        rng = self._rng
        changes: dict[str, Any] = rng.choice(({}, {}, {"dtype": "float16"}, {"pinned": True}))
        if not changes and rng.random() < 0.2:
            changes = {"ttl": 0.01}
        if rng.random() < 0.4:
            changes = {**changes, "kv_cache_memory": rng.randrange(1, 300)}
        return ModelConfig(model_id, "nowhere", config=_SPLIT, **changes)

    def _call(
        self,
        operation: str,
        model_id: str,
        ask: Callable[[], Coroutine[Any, Any, Any]],
        config: ModelConfig | None = None,
    ) -> None:
        caller = asyncio.create_task(
            self._caller(operation, model_id, ask, config),
            name=f"{operation} {model_id} {len(self._trials)}",
        )
        self._callers.add(caller)
        caller.add_done_callback(self._callers.discard)

    async def _caller(
        self,
        operation: str,
        model_id: str,
        ask: Callable[[], Coroutine[Any, Any, Any]],
        config: ModelConfig | None,
    ) -> None:
        """Ask, and compare the answer with what the oracle says: all is decided at once."""
        expected = None
        if operation not in {"look", "listen"}:
            expected = self._oracle.refusal(operation, model_id, config)
        try:
            answer = await ask()
        except asyncio.CancelledError:
            return
        except (ManagerError, DrainTimeoutError) as error:
            if expected is not None and not isinstance(error, expected):
                self._wrong.append(f"{operation} {model_id}: {error!r}, not {expected.__name__}")
        except Exception as error:  # noqa: BLE001 - it is wrong, whatever it is
            self._wrong.append(f"{operation} {model_id} ended with {error!r}")
        else:
            if expected is not None:
                self._wrong.append(f"{operation} {model_id}: {answer}, not {expected.__name__}")

    # --- The end ---------------------------------------------------------------------------

    async def _end(self) -> None:
        """Shut down before or after all that waits goes on, and wait for everybody."""
        first = self._rng.random() < 0.5
        if first:
            self._release_everything()
        closing = [
            asyncio.create_task(self._manager.shutdown(self._rng.choice((0, 0.05, 0.2))))
            for _ in range(self._rng.randrange(1, 3))
        ]
        done, late = await asyncio.wait(closing, timeout=LONGEST)
        self._wrong += [f"the shutdown did not end: {task}" for task in late]
        self._wrong += [f"the shutdown: {t.exception()!r}" for t in done if t.exception()]
        self._look_after("shutdown")
        self._release_everything()
        self._kept.clear()
        gc.collect()
        if self._callers:
            _, late = await asyncio.wait(set(self._callers), timeout=LONGEST)
            self._wrong += [f"nobody told the caller: {task}" for task in late]
        await self._until_released()
        self._check_nothing_left()

    def _release_everything(self) -> None:
        self._loader.release_all()
        for gate in self._gates:
            gate.set()
        for ends in self._blocks:
            ends.set()
        for hold in self._holds:
            hold.release()
        self._holds.clear()

    async def _until_released(self) -> None:
        """Wait for threads that were left behind."""
        deadline = time.monotonic() + LONGEST
        resources = self._manager.resource_manager
        while resources.get_current_usage().reserved_bytes and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
            gc.collect()

    def _check_nothing_left(self) -> None:
        manager = self._manager
        table, usage = manager._table, manager.resource_manager.get_current_usage()
        left = {
            "models": table.models,
            "reloads": table.successors,
            "retiring": table.retiring,
            "owners": list(manager._owners),
            "reservations": usage.reservations,
            "readers": len(table.bus),
            "waiting for memory": manager.resource_manager.on_change,
            "leases": [m._leases for m in self._oracle.seen if m._leases],
            "in flight": [m.model_id for m in self._oracle.seen if m.in_flight],
            "caches": [m.model_id for m in self._oracle.seen if m.kv_cache_bytes],
            "timers": [m.timer for m in self._oracle.seen if m.timer is not None],
            "models kept": [m for m in self._oracle.seen if m._model is not None],
            "tasks": [
                t
                for t in asyncio.all_tasks()
                if t is not asyncio.current_task() and t.get_name() != "watchdog"
            ],
        }
        self._wrong += [f"left over: {name}: {what}" for name, what in left.items() if what]


class _CachingHold:
    """What a session is to the manager: a hold on its load, and memory for its cache."""

    def __init__(self, managed: AsyncManagedModel, memory: CacheMemory) -> None:
        self._managed, self._memory = managed, memory
        self._nbytes = 0
        self._hold: Hold | None = managed.hold(lambda _: self.release())

    def grow(self, nbytes: int) -> None:
        """Take so many bytes more, if they are to be had."""
        if self._hold is None:
            return
        with suppress(NoMemoryError):
            self._memory.grow(self._managed, nbytes)
            self._nbytes += nbytes

    def release(self) -> None:
        """End; a second time does nothing."""
        if self._hold is not None:
            self._memory.give_back(self._managed, self._nbytes)
            self._hold.release()
        self._hold = None


def _left_threads(before: set[threading.Thread]) -> list[str]:
    """Return the threads of the manager that do not end."""
    left = []
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("splitlearn-"):
            thread.join(LONGEST)
            if thread.is_alive():
                left.append(f"left over: {thread}")
    return left
