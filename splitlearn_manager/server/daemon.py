"""The daemon: the life of the process, from its socket to its exit code.

bind     take the port, so that a wrong address is found out before anything is loaded
start    manager, sessions and HTTP; from here on probes are answered
load     begin to load what the configuration names
wait     until a signal, or `stop`; SIGHUP reads the configuration again
drain    ready is 503, live stays 200; streams of events end, loads are asked to; sessions end when
         their step in flight is answered
end      HTTP, then the manager and its models
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from splitlearn_manager.config.changes import compare, in_force
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.core.deadlines import LoadDeadlines
from splitlearn_manager.core.doorbell import PlainDoorbell
from splitlearn_manager.core.events import ProgressEvent
from splitlearn_manager.core.loads import LoadPolicy
from splitlearn_manager.core.resources import ResourceManager
from splitlearn_manager.core.retry import RetryPolicy
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.generation.engine import EngineLimits, Engines
from splitlearn_manager.observability import Metrics, configure_logging
from splitlearn_manager.server.access_log import AccessLog
from splitlearn_manager.server.app import build_app
from splitlearn_manager.server.catalogue import Catalogue
from splitlearn_manager.server.desired_models import DesiredModels
from splitlearn_manager.server.http_server import HttpServer
from splitlearn_manager.server.listener import listen, url_of
from splitlearn_manager.server.loop_lag import watch_loop
from splitlearn_manager.server.places import Shares
from splitlearn_manager.server.readiness import Readiness
from splitlearn_manager.server.security import AccessPolicy
from splitlearn_manager.server.sessions_ws import SessionEndpoint
from splitlearn_manager.server.systemd import Notifier, keep_watchdog
from splitlearn_manager.server.tls import server_context
from splitlearn_manager.server.waiting import SHUTTING_DOWN
from splitlearn_manager.serving.batcher import BatchLimits
from splitlearn_manager.serving.claims import Quota, Quotas
from splitlearn_manager.serving.infer_errors import ShuttingDownError
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.tracing import start

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Iterator
    from types import FrameType

    from splitlearn_manager.config import DaemonConfig, ManagerLimits, ServerConfig
    from splitlearn_manager.config.changes import ConfigChanges
    from splitlearn_manager.errors import ManagerError
    from splitlearn_manager.tracing import Tracing

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(config: DaemonConfig, reread: Callable[[], DaemonConfig] | None = None) -> int:
    """Run a daemon in this process until it is told to end, and return its exit code.

    Args:
        config: What it is told.
        reread: Returns what it is told now; called in a thread when SIGHUP comes.

    Raises:
        ConfigError: The address, the token or the certificate can't be had; nothing was started.
    """
    server = config.server
    configure_logging(server.log_level, server.log_format, access_log=server.access_log)
    with Daemon(config, reread=reread) as daemon:
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
        reread: Returns what it is told now, or raises a `ConfigError`; called in a thread when
            SIGHUP comes.
        notifier: Who tells systemd; made from the environment by default.
        tracing: Who makes spans; made as configuration and environment say, unless one is given.

    Attributes:
        config: What is in force.
        url: Its address, once the port is taken.
        metrics: What `/metrics` shows.
    """

    def __init__(
        self,
        config: DaemonConfig,
        *,
        manager: AsyncModelManager | None = None,
        announce: Callable[[str], None] | None = None,
        reread: Callable[[], DaemonConfig] | None = None,
        notifier: Notifier | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self.config = config
        self.url = ""
        self.metrics = Metrics()
        self._announce = announce or _say
        self._manager = manager
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reread = reread
        self._notifier = Notifier() if notifier is None else notifier
        self._stop = asyncio.Event()
        self._hang_up = asyncio.Event()

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
            server = self.config.server
            self._listener = listen(server.host, server.port)
            self.url = url_of(self._listener, "https" if server.tls_cert_file else "http")
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
            ConfigError: The port, the token or the certificate can't be had.
        """
        self._loop = asyncio.get_running_loop()
        listener = self.bind()
        with listener, self._signals(), self._traces():
            parts = self._assemble(listener)
            async with parts.manager, parts.table:
                async with asyncio.TaskGroup() as tasks:
                    await self._start(parts, tasks, listener)
                    helpers = [tasks.create_task(work) for work in self._helpers(parts)]
                    follower = tasks.create_task(self._follow_file(parts))
                    await self._stop.wait()
                    follower.cancel()
                    timeout = self.config.server.drain_timeout
                    deadline = self._loop.time() + timeout - _reserve(timeout) / 2
                    clean = await self._drain(parts, deadline)
                    for helper in helpers:
                        helper.cancel()
                await parts.engines.close()
                await parts.manager.shutdown(max(0, deadline - self._loop.time()))
        logger.info("ended, %s", "all was answered" if clean else "not all was answered")
        return 0 if clean else 1

    def stop(self) -> None:
        """Ask the daemon to drain and end; from any thread, also before it runs."""
        self._set(self._stop)

    def reload(self) -> None:
        """Ask the daemon to read its configuration again; from any thread."""
        self._set(self._hang_up)

    def _set(self, event: asyncio.Event) -> None:
        """Set an event of the loop, from any thread."""
        if self._loop is None:
            event.set()
        else:
            PlainDoorbell(self._loop).call(event.set)

    # --- Start -----------------------------------------------------------------------------

    def _assemble(self, listener: socket.socket) -> _Parts:
        """Make what the daemon consists of; nothing runs yet."""
        server = self.config.server
        manager = self._manager or self._make_manager()
        catalogue = Catalogue(self.config.models)
        readiness = Readiness(manager, catalogue)
        manager.on_transition.extend([self.metrics.model_moved, readiness.model_moved])
        manager.on_failed_reload.append(self.metrics.reload_failed)
        tracing, access_log = self._tracing, AccessLog() if server.access_log else None
        if tracing is not None:
            manager.on_transition.append(tracing.model_moved)
            manager.on_failed_reload.append(tracing.reload_failed)
        table = SessionTable(
            manager,
            max_sessions=server.max_sessions,
            idle_timeout=server.session_idle_timeout,
            resume_timeout=server.session_resume_timeout,
            metrics=self.metrics,
            observers=[one for one in (access_log, tracing) if one is not None],
            on_turn=None if tracing is None else tracing.turn,
            limits=BatchLimits(server.max_batch_size, server.prefill_chunk_size),
            quotas=_quotas(server),
        )
        sessions = SessionEndpoint(
            manager,
            table,
            self.metrics,
            max_frame_bytes=server.max_frame_bytes,
            tracing=tracing,
        )
        engines = Engines(
            manager.resource_manager,
            EngineLimits(server.max_batch_size, server.prefill_chunk_size, server.max_queue_size),
            self.metrics,
        )
        stopping = asyncio.Event()
        app = build_app(
            manager,
            policy=AccessPolicy.of(server, port=listener.getsockname()[1]),
            sessions=sessions,
            engines=engines,
            readiness=readiness,
            metrics=self.metrics,
            catalogue=catalogue,
            management=server.management,
            stopping=stopping,
            max_body_bytes=server.max_frame_bytes,
            max_queue_size=server.max_queue_size,
            max_rows=server.max_batch_size,
            shares=_shares(server),
            access_log=access_log,
            tracing=tracing,
        )
        tls = server_context(server.tls_cert_file, server.tls_key_file)
        http = HttpServer(app, max_frame_bytes=server.max_frame_bytes, tls=tls)
        desired = DesiredModels(manager, catalogue, readiness)
        return _Parts(
            manager, table, sessions, engines, readiness, http, catalogue, desired, stopping
        )

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
            load_policy=_load_policy(limits),
            memory_patience=limits.memory_wait,
        )

    async def _start(
        self, parts: _Parts, tasks: asyncio.TaskGroup, listener: socket.socket
    ) -> None:
        """Begin to answer."""
        tasks.create_task(parts.http.serve(sockets=[listener]), name="http")
        await parts.http.listening.wait()
        self._notifier.ready(f"listening on {self.url}, loading models")
        self._announce(f"splitlearn: listening on {self.url}")

    def _helpers(self, parts: _Parts) -> list[Coroutine[Any, Any, None]]:
        """Return what runs beside the server until its end."""
        return [
            self._load(parts),
            keep_watchdog(self._notifier, parts.manager.check_alive),
            watch_loop(self.metrics.loop_lag),
            *([] if self._tracing is None else [_follow_loads(parts.manager, self._tracing)]),
        ]

    async def _load(self, parts: _Parts) -> None:
        """Load what the configuration names; a model that can't be loaded keeps none waiting."""
        loaded = await parts.desired.preload()
        count = _count(len(loaded), "model")
        if all(loaded):
            line = f"ready ({count})"
        else:
            line = f"not ready, loaded {sum(loaded)} of {count}; the log says why"
        self._notifier.status(line)
        self._announce(f"splitlearn: {line}")

    # --- Another configuration -------------------------------------------------------------

    async def _follow_file(self, parts: _Parts) -> None:
        """Read the configuration again whenever somebody asks for that, until the end begins."""
        while True:
            await self._hang_up.wait()
            self._hang_up.clear()
            self._notifier.reloading()
            try:
                self._notifier.ready(await self._read_again(parts))
            except Exception:  # whatever it is, the daemon goes on as it is
                logger.exception("reading the configuration again failed; nothing was changed")
                self._notifier.ready("the configuration could not be read again")

    async def _read_again(self, parts: _Parts) -> str:
        """Let another configuration hold, if there is one and it is valid; say what was done."""
        if self._reread is None:
            logger.warning("SIGHUP: the daemon was started without a file to read again")
            return "no configuration to read again"
        try:
            new = await asyncio.to_thread(self._reread)
        except ConfigError as error:
            for problem in error.problems:
                logger.error("the configuration stays as it was: %s", problem)  # noqa: TRY400
            return "the configuration is invalid and was not taken; the log says why"
        changes = compare(self.config, new)
        logger.info("the configuration was read again: %s", changes)
        if changes.fixed:
            logger.warning(
                "until the next start these stay as they were: %s", ", ".join(changes.fixed)
            )
        self._adopt(parts, new, changes)
        return f"configuration read again: {changes}"

    def _adopt(self, parts: _Parts, new: DaemonConfig, changes: ConfigChanges) -> None:
        """Let a configuration hold, and begin what follows from it."""
        self.config = in_force(self.config, new)
        if "log_level" in changes.server:
            logging.getLogger().setLevel(self.config.server.log_level.upper())
        if changes.limits:
            limits = self.config.manager
            parts.manager.set_limits(
                max_models=limits.max_models,
                memory_limit=limits.memory_limit,
                eviction=limits.eviction,
                load_policy=_load_policy(limits),
                memory_patience=limits.memory_wait,
            )
        parts.catalogue.replace(self.config.models)
        parts.readiness.forget(changes.removed)
        parts.desired.follow(changes)

    # --- End -------------------------------------------------------------------------------

    async def _drain(self, parts: _Parts, deadline: float) -> bool:
        """End loads, sessions, HTTP, all before the deadline; return whether steps were answered.

        Nothing new is taken on from the first line on; probes are answered until HTTP ends.
        """
        timeout = self.config.server.drain_timeout
        reserve = _reserve(timeout)
        logger.info("draining %s, for up to %g s", _count(len(parts.table), "session"), timeout)
        parts.readiness.draining = True
        self._notifier.stopping()
        parts.stopping.set()
        await parts.desired.close()
        await parts.manager.stop_loading()
        ends = await asyncio.gather(
            parts.sessions.drain(timeout - reserve),
            parts.engines.drain(timeout - reserve, _ended_early),
        )
        left = deadline - reserve / 4 - asyncio.get_running_loop().time()
        parts.http.stop(max(_SHORTEST_GRACE, left))
        return all(ends)

    @contextmanager
    def _traces(self) -> Iterator[None]:
        """Trace what happens, if that is wanted.

        Raises:
            ConfigError: It is, and can't be done.
        """
        self._tracing = self._tracing or start(self.config.server.tracing)
        try:
            yield
        finally:
            if self._tracing is not None:
                self._tracing.stop()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let the first signal stop the daemon, and a second one the process, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if hasattr(signal, "SIGHUP"):
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: self.reload())
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
    engines: Engines
    readiness: Readiness
    http: HttpServer
    catalogue: Catalogue
    desired: DesiredModels
    stopping: asyncio.Event


async def _follow_loads(manager: AsyncModelManager, tracing: Tracing) -> None:
    """Tell the traces of the phases of loads, as long as there are events."""
    with manager.subscribe() as events:
        async for event in events:
            if isinstance(event, ProgressEvent):
                tracing.progress(event)


_RESERVE = 2.0
"""Seconds of the drain's time, at most, that are kept for what follows the sessions: a quarter each
for HTTP and the models, and half for the process' own end, since torch takes a while to go."""

_SHORTEST_GRACE = 0.1


def _ended_early() -> ManagerError:
    """Return what a request is told that has not ended when the time is up."""
    return ShuttingDownError(f"{SHUTTING_DOWN}, and the answer was not done in time")


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


def _load_policy(limits: ManagerLimits) -> LoadPolicy:
    """Return how patient loads are, by the configuration."""
    return LoadPolicy(
        LoadDeadlines(stall=limits.load_stall_timeout), RetryPolicy(attempts=limits.load_attempts)
    )


def _quotas(server: ServerConfig) -> Quotas:
    """Return how much clients may hold, by the configuration."""
    return Quotas(
        everyone=Quota(None, server.max_positions, server.max_cache_bytes),
        each=Quota(
            server.max_sessions_per_client,
            server.max_positions_per_client,
            server.max_cache_bytes_per_client,
        ),
        named={
            client.name: Quota(client.max_sessions, client.max_positions, client.max_cache_bytes)
            for client in server.tokens
        },
    )


def _shares(server: ServerConfig) -> Shares:
    """Return how many inference requests clients may have, by the configuration."""
    named = {client.name: client.max_infer for client in server.tokens}
    return Shares(server.max_infer_per_client, named)


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
