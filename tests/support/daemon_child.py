"""A daemon in a process of its own, whose forwards wait for its parent.

    daemon_child.py [DRAIN_TIMEOUT [MODEL…]]

Each forward prints a line, and goes on when it has read one from stdin.  The load of `hang` prints
one and never ends, nor does it look whether it should; that of `late` prints one, and looks.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from serving_fakes import FakeLoader, FakePart, trunk_config

from splitlearn_manager import AsyncModelManager, ModelConfig, ResourceManager, ServerConfig
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.server.daemon import Daemon


class WaitingPart(FakePart):
    """A Trunk that asks on stdout, and waits for the answer on stdin."""

    def __call__(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sys.stdout.write("forward\n")
        sys.stdout.flush()
        sys.stdin.readline()
        return super().__call__(inputs, **kwargs)


class WaitingLoader(FakeLoader):
    """Loads such a Trunk."""

    def load_from_config(self, config: ModelConfig, progress: Any = None) -> FakePart:
        if config.model_id in {"hang", "late"}:
            sys.stdout.write("loading\n")
            sys.stdout.flush()
            while True:
                threading.Event().wait(0.01)
                if config.model_id == "late" and progress is not None:
                    progress.check()
        return WaitingPart()


def main() -> int:
    """Run the daemon; the exit code is its own."""
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 20), loader=WaitingLoader(), single_threaded=False
    )
    drain_timeout = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    config = DaemonConfig(
        server=ServerConfig(port=0, drain_timeout=drain_timeout, management=True),
        models=tuple(map(trunk_config, sys.argv[2:] or ["trunk"])),
    )
    with Daemon(config, manager=manager) as daemon:
        return daemon.run()


if __name__ == "__main__":
    sys.exit(main())
