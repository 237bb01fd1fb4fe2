"""A daemon in a process of its own, whose forwards wait for its parent.

Each forward prints a line, and goes on when it has read one from stdin.
"""

from __future__ import annotations

import sys
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
        del config, progress
        return WaitingPart()


def main() -> int:
    """Run the daemon; the exit code is its own."""
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 20), loader=WaitingLoader(), single_threaded=False
    )
    config = DaemonConfig(server=ServerConfig(port=0), models=(trunk_config("trunk"),))
    with Daemon(config, manager=manager) as daemon:
        return daemon.run()


if __name__ == "__main__":
    sys.exit(main())
