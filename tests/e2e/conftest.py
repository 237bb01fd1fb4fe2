"""Fixtures of the tests that start real daemons."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import make_checkpoint

__all__ = ["make_checkpoint"]

COMMAND = [sys.executable, "-m", "splitlearn_manager"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the daemon does: the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command line to its end."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@contextmanager
def running_daemon(config: Path) -> Iterator[str]:
    """Serve a configuration on a free port; yields the address, ends with SIGTERM and exit 0."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--config", str(config), "--port", "0"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _address(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _address(process: subprocess.Popen[str]) -> str:
    address = ""
    for line in process.stdout or ():
        if match := re.search(r"listening on (\S+)", line):
            address = match.group(1)
        if "ready" in line:
            return address
    raise AssertionError("the daemon ended before it was ready")


@pytest.fixture
def daemon(tmp_path: Path) -> Callable[..., Any]:
    """Return a context manager that serves a list of models."""

    def serve(models: list[dict[str, Any]], **server: Any) -> Any:
        config = tmp_path / "daemon.yaml"
        config.write_text(yaml.safe_dump({"server": server, "models": models}))
        return running_daemon(config)

    return serve
