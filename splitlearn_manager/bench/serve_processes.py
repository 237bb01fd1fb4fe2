"""The processes of `bench serve`: the server, the clients and the reference, each by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from splitlearn_manager.bench.errors import BenchError

_SERVER = "splitlearn_manager.bench.serve_server"
_CLIENT = "splitlearn_manager.bench.serve_client"
_PEERS = "splitlearn_manager.bench.serve_peers"
_STOP_SECONDS = 60


@contextmanager
def started(task: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Run a server, and yield its address."""
    with process_of(task, arguments) as (_, address):
        yield address


@contextmanager
def process_of(task: str, arguments: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server, and yield it and its address; it ends with the block."""
    process = subprocess.Popen(  # noqa: S603 - this very Python, and a module of our own
        _command(_SERVER, task, arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process, _line(process.stdout)
            if process.stdin is not None:
                process.stdin.close()
            process.wait(_STOP_SECONDS)
        finally:
            process.kill()


def _line(output: IO[str] | None) -> str:
    line = output.readline().strip() if output is not None else ""
    if not line:
        raise BenchError("the server ended before it said where it is")
    return line


def reference(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the reference, and return what it took."""
    return _figures(_command(_SERVER, task, arguments))


def peer(task: str, arguments: dict[str, Any]) -> float:
    """Generate from the whole model in one of the ways there are; return the tokens a second."""
    return float(_figures(_command(_PEERS, task, arguments))["rate"])


def ask(task: str, **arguments: Any) -> dict[str, Any]:
    """Let the clients do a task, and return what they saw."""
    return _figures(_command(_CLIENT, task, arguments))


def _figures(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise BenchError(f"the measured process failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _command(module: str, task: str, arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", module, task, json.dumps(arguments)]
