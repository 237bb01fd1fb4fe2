"""A process that has imported everything, and starts daemons by forking: each is a process.

A start takes seconds otherwise, most of them imports.  It has one thread, and what it has loaded is
gone, so that what it forks is as good as new.

    nursery.py          reads PORT from stdin, a line for each daemon, and writes `PID`

A daemon writes its own lines to stdout; what else is to be known is in its log.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from splitlearn_core.factory import load_component
from splitlearn_core.utils.threads import configure_pytorch_threads
from splitlearn_manager import AsyncModelManager, ModelConfig, ResourceManager, ServerConfig
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.observability import configure_logging
from splitlearn_manager.server.daemon import Daemon

SPLIT_POINTS = (2, 6)


def main() -> int:
    """Fork a daemon for each port that is read, until there are no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    configure_pytorch_threads()
    part = load_component("builtin:demo", "trunk", SPLIT_POINTS, dtype="float32")
    with torch.inference_mode():
        part(torch.zeros(1, 2, part.hidden_size), past_key_values=part.new_cache())
    del part
    _say("born")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os._exit(_serve(int(line)))
        _say(f"forked {pid}")
    return 0


def _serve(port: int) -> int:
    """Be a daemon."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    configure_logging("warning")
    options = {"component": "trunk", "split_points": SPLIT_POINTS}
    model = ModelConfig("trunk", "builtin:demo", dtype="float32", config=options)
    server = ServerConfig(port=port, management=True, drain_timeout=5.0, session_resume_timeout=5.0)
    manager = AsyncModelManager(ResourceManager(), num_threads=1)
    config = DaemonConfig(server=server, models=(model,))
    with Daemon(config, manager=manager, announce=_say) as daemon:
        return daemon.run()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
