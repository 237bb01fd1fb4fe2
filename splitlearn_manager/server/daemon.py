"""The daemon: the life of the process, from its socket to its exit code.

bind     take the port, so that a wrong address is found out before anything is loaded
start    manager, sessions and HTTP; from here on probes are answered
load     begin to load what the configuration names
wait     until a signal, or `stop`
drain    ready is 503; sessions end when their step in flight is answered
end      HTTP, then the manager and its models
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.deadlines import LoadDeadlines
from splitlearn_manager.core.loads import LoadPolicy
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.retry import RetryPolicy
from splitlearn_manager.errors import ManagerError
from splitlearn_manager.observability import Metrics, configure_logging
from splitlearn_manager.server.app import build_app
from splitlearn_manager.server.http_server import HttpServer
from splitlearn_manager.server.listener import listen, url_of
from splitlearn_manager.server.readiness import Readiness
from splitlearn_manager.server.security import AccessPolicy
from splitlearn_manager.server.sessions_ws import SessionEndpoint
from splitlearn_manager.serving.sessions import SessionTable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from types import FrameType

    from splitlearn_manager.config import DaemonConfig, ModelConfig

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(config: DaemonConfig) -> int:
    """Run a daemon in this process until it is told to end, and return its exit code.

    Raises:
        ConfigError: The address or the token can't be had; nothing was started.
    """
    configure_logging(config.server.log_level)
    with Daemon(config) as daemon:
        return daemon.run()


class Daemon:
    """One daemon.

        with Daemon(config) as daemon:
            code = daemon.run()

    Args:
        config: What it is told.
        manager: Who has the models; made as the configuration says, unless one is given.  It is
            shut down at the end.
        announce: Says what whoever started the daemon waits for; prints it by default.

    Attributes:
        url: Its address, once the port is taken.
        metrics: What `/metrics` shows.
    """

    def __init__(
        self,
        config: DaemonConfig,
        *,
        manager: AsyncModelManager | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.url = ""
        self.metrics = Metrics()
        self._announce = announce or _say
        self._manager = manager
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        """Take the port."""
        self.bind()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the port back."""
        if self._listener is not None:
            self._listener.close()

    def bind(self) -> socket.socket:
        """Take the port, if that was not done yet.

        Raises:
            ConfigError: It can't be had.
        """
        if self._listener is None:
            self._listener = listen(self.config.server.host, self.config.server.port)
            self.url = url_of(self._listener)
        return self._listener

    def run(self) -> int:
        """Serve in an event loop of its own, and return the exit code."""
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(self.serve())

    async def serve(self) -> int:
        """Live from `start` to `end` in the running event loop.

        Returns:
            The exit code: 0 if every step in flight was answered, 1 if the deadline came before.

        Raises:
            ConfigError: The port or the token can't be had.
        """
        self._loop = asyncio.get_running_loop()
        listener = self.bind()
        with listener, self._signals():
            parts = self._assemble(listener)
            async with parts.manager, parts.table:
                async with asyncio.TaskGroup() as tasks:
                    await self._start(parts, tasks, listener)
                    loading = tasks.create_task(self._load(parts), name="loading models")
                    await self._stop.wait()
                    loading.cancel()
                    timeout = self.config.server.drain_timeout
                    deadline = self._loop.time() + timeout - _reserve(timeout) / 2
                    clean = await self._drain(parts, deadline)
                await parts.manager.shutdown(max(0, deadline - self._loop.time()))
        logger.info("ended, %s", "all was answered" if clean else "not all was answered")
        return 0 if clean else 1

    def stop(self) -> None:
        """Ask the daemon to drain and end; from any thread, also before it runs."""
        if self._loop is None:
            self._stop.set()
        else:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop.set)

    # --- Start -----------------------------------------------------------------------------

    def _assemble(self, listener: socket.socket) -> _Parts:
        """Make what the daemon consists of; nothing runs yet."""
        server = self.config.server
        manager = self._manager or self._make_manager()
        manager.on_transition.append(self.metrics.model_moved)
        table = SessionTable(
            manager,
            max_sessions=server.max_sessions,
            idle_timeout=server.session_idle_timeout,
            metrics=self.metrics,
        )
        sessions = SessionEndpoint(manager, table, max_frame_bytes=server.max_frame_bytes)
        readiness = Readiness(manager, [model.model_id for model in self.config.models])
        app = build_app(
            manager,
            policy=AccessPolicy.of(server, port=listener.getsockname()[1]),
            sessions=sessions,
            readiness=readiness,
            metrics=self.metrics,
        )
        http = HttpServer(app, max_frame_bytes=server.max_frame_bytes)
        return _Parts(manager, table, sessions, readiness, http)

    def _make_manager(self) -> AsyncModelManager:
        """Return a manager with the configured limits; this imports torch and sets its threads."""
        limits = self.config.manager
        return AsyncModelManager(
            ResourceManager(limits.max_memory_percent, limits.memory_limit),
            max_models=limits.max_models,
            max_workers=limits.max_workers,
            single_threaded=False,
            num_threads=self.config.server.threads,
            eviction=limits.eviction,
            load_policy=LoadPolicy(
                LoadDeadlines(stall=limits.load_stall_timeout),
                RetryPolicy(attempts=limits.load_attempts),
            ),
            memory_patience=limits.memory_wait,
        )

    async def _start(
        self, parts: _Parts, tasks: asyncio.TaskGroup, listener: socket.socket
    ) -> None:
        """Begin to answer."""
        parts.readiness.starting = bool(self.config.models)
        tasks.create_task(parts.http.serve(sockets=[listener]), name="http")
        await parts.http.listening.wait()
        self._announce(f"splitlearn: listening on {self.url}")

    async def _load(self, parts: _Parts) -> None:
        """Load what the configuration names; a model that can't be loaded keeps none waiting."""
        models = self.config.models
        loaded = await asyncio.gather(*(self._load_one(parts, model) for model in models))
        parts.readiness.starting = False
        if all(loaded):
            self._announce(f"splitlearn: ready ({_count(len(models), 'model')})")
        else:
            good = f"{sum(loaded)} of {_count(len(models), 'model')}"
            self._announce(f"splitlearn: not ready, loaded {good}; the log says why")

    async def _load_one(self, parts: _Parts, model: ModelConfig) -> bool:
        """Load a model, and return whether it is ready."""
        try:
            return await parts.manager.load_model(model)
        except ManagerError as error:
            # The manager has logged where it came from.
            logger.error("model %s was not loaded: %s", model.model_id, error)  # noqa: TRY400
            parts.readiness.refused[model.model_id] = str(error)
            return False

    # --- End -------------------------------------------------------------------------------

    async def _drain(self, parts: _Parts, deadline: float) -> bool:
        """End sessions, then HTTP, all before the deadline; return whether steps were answered."""
        timeout = self.config.server.drain_timeout
        reserve = _reserve(timeout)
        logger.info("draining %s, for up to %g s", _count(len(parts.table), "session"), timeout)
        parts.readiness.draining = True
        clean = await parts.sessions.drain(timeout - reserve)
        left = deadline - reserve / 4 - asyncio.get_running_loop().time()
        parts.http.stop(max(_SHORTEST_GRACE, left))
        return clean

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let the first signal stop the daemon, and a second one the process, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Stop; the operating system's own handling is what a second signal meets."""
        del number, frame
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        self.stop()


@dataclass(frozen=True)
class _Parts:
    """What a daemon consists of while it serves."""

    manager: AsyncModelManager
    table: SessionTable
    sessions: SessionEndpoint
    readiness: Readiness
    http: HttpServer


_RESERVE = 2.0
"""Seconds of the drain's time, at most, that are kept for what follows the sessions: a quarter each
for HTTP and the models, and half for the process' own end, since torch takes a while to go."""

_SHORTEST_GRACE = 0.1


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it can be had: there is none for Windows."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop


def _reserve(timeout: float) -> float:
    """Return the seconds of a drain's time that sessions can't have."""
    return min(_RESERVE, timeout / 10)


def _count(number: int, noun: str) -> str:
    """Return `1 model`, `2 models`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _say(line: str) -> None:
    """Print a line for whoever started the daemon, at once; nobody need be listening any more."""
    try:
        print(line, flush=True)  # noqa: T201 - this is the daemon's output
    except OSError as error:
        logger.warning("could not print %r: %s", line, error)
        sys.stdout = None  # what is left in its buffer would fail again at the exit
