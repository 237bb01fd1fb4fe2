"""A daemon in a process of its own, that says what it holds.

    daemon_child.py IDLE_TIMEOUT RESUME_TIMEOUT NAME=PATH=FIRST,SECOND…

After its address, a line of JSON answers each line on stdin.  It ends when stdin does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
from collections import Counter
from typing import Any

import psutil

from splitlearn_core.cache import PartCache
from splitlearn_core.machine import return_freed_memory
from splitlearn_manager import AsyncModelManager, ModelConfig, ResourceManager, ServerConfig
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.observability import configure_logging
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.serving.session import Session


def main(idle_timeout: float, resume_timeout: float, models: list[str]) -> int:
    """Run the daemon; the exit code is its own."""
    configure_logging("warning")
    resources = ResourceManager()
    manager = AsyncModelManager(resources, single_threaded=False, num_threads=1)
    server = ServerConfig(
        port=0,
        session_idle_timeout=idle_timeout,
        session_resume_timeout=resume_timeout,
        drain_timeout=60,
    )
    config = DaemonConfig(server=server, models=tuple(map(_model, models)))
    with Daemon(config, manager=manager, announce=_say) as daemon:
        watch = threading.Thread(target=_answer, args=(daemon, resources), daemon=True)
        watch.start()
        return daemon.run()


def _model(text: str) -> ModelConfig:
    name, path, cut = text.split("=")
    points = [int(point) for point in cut.split(",")]
    options = {"component": "trunk", "split_points": points}
    return ModelConfig(name, path, dtype="float32", warmup=True, config=options)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _answer(daemon: Daemon, resources: ResourceManager) -> None:
    """Say what there is, as often as it is asked."""
    try:
        for _ in sys.stdin:
            loop = daemon._loop
            assert loop is not None
            look = asyncio.run_coroutine_threadsafe(_look(daemon, resources), loop).result()
            _say(json.dumps(look))
    finally:
        daemon.stop()


async def _look(daemon: Daemon, resources: ResourceManager) -> dict[str, Any]:
    gc.collect()
    return_freed_memory()
    process = psutil.Process()
    held = sum(issubclass(type(thing), PartCache | Session) for thing in gc.get_objects())
    return {
        "tasks": Counter(_name(task) for task in asyncio.all_tasks()),
        "threads": threading.active_count(),
        "descriptors": process.num_fds(),
        "resident": process.memory_info().rss,
        "held": held,
        "reserved": dict(resources.get_current_usage().reservations),
        "metrics": _metrics(daemon),
    }


def _name(task: asyncio.Task[Any]) -> str:
    """Return what a task does: names may be numbers."""
    return getattr(task.get_coro(), "__qualname__", "?")


def _metrics(daemon: Daemon) -> list[tuple[str, dict[str, str], float]]:
    return [
        (sample.name, sample.labels, sample.value)
        for metric in daemon.metrics.registry.collect()
        for sample in metric.samples
        if sample.name.startswith("splitlearn_session")
    ]


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
