"""The process that serves while serving is measured, and what it is compared with.

python -m splitlearn_manager.bench.serve_server TASK '{"name": value, …}'

`daemon` serves a Trunk, `echo` a part without layers, `raw` the same bytes over bare asyncio
streams; each writes its address and serves until its standard input ends.  `static` serves nothing:
it runs a static batch of the same part in this process, and writes what that took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from splitlearn_core.estimate import MemoryEstimate
from splitlearn_core.factory import load_component
from splitlearn_core.utils.threads import configure_pytorch_threads
from splitlearn_manager.bench.serve_client import LENGTH_BYTES, RAW_LIMIT
from splitlearn_manager.config import DaemonConfig, ModelConfig, ServerConfig
from splitlearn_manager.core.async_model_manager import AsyncModelManager
from splitlearn_manager.server.daemon import Daemon

if TYPE_CHECKING:
    from splitlearn_manager.core.progress import LoadProgress


def serve_daemon(
    model: str,
    points: list[int],
    server: dict[str, Any],
    dtype: str | None = None,
    quantization: str | None = None,
) -> None:
    """Serve a Trunk."""
    part = {"component": "trunk", "split_points": points, "quantization": quantization}
    config = ModelConfig("trunk", model, dtype=dtype, config=part)
    _serve(DaemonConfig(server=ServerConfig(port=0, **server), models=(config,)))


def serve_echo(hidden_size: int, server: dict[str, Any]) -> None:
    """Serve a part that gives back what it is given, in bfloat16."""
    part = {"component": "trunk", "split_points": [1, 2]}
    config = ModelConfig("trunk", "nowhere", config=part)
    daemon = DaemonConfig(server=ServerConfig(port=0, **server), models=(config,))
    _serve(daemon, AsyncModelManager(loader=_EchoLoader(hidden_size)))


def serve_raw() -> None:
    """Echo messages, each with its length before it, over bare asyncio streams."""
    asyncio.run(_serve_raw())


def static_batch(
    model: str, points: list[int], batch: int, prompt: int, new: int, dtype: str | None = None
) -> None:
    """Run a static batch of the part, as one process does that has it to itself."""
    configure_pytorch_threads(single_threaded=True)
    part = load_component(model, "trunk", tuple(points), dtype=dtype)
    size = part.hidden_size
    hidden = torch.randn(batch, prompt, size).to(part.dtype)
    one = hidden[:, :1].contiguous()
    with torch.inference_mode():
        _batch(part, hidden, one, 2)  # pages in the weights
        start = time.perf_counter()
        first = _batch(part, hidden, one, new)
        total = time.perf_counter() - start
    _say(json.dumps({"seconds": total, "prompt_seconds": first}))


def _batch(part: Any, hidden: torch.Tensor, one: torch.Tensor, new: int) -> float:
    """Run a prompt and so many positions; return the seconds of the prompt."""
    cache = part.new_cache()
    start = time.perf_counter()
    part(hidden, past_key_values=cache)
    first = time.perf_counter() - start
    for _ in range(new):
        part(one, past_key_values=cache)
    return first


class EchoPart:
    """A Trunk without layers."""

    component = "trunk"
    start_layer, end_layer, num_layers = 1, 2, 3
    device = torch.device("cpu")
    dtype = hidden_dtype = torch.bfloat16
    side_inputs = side_outputs = ()
    max_positions = None
    drops_positions = True  # it keeps none, so that no two sessions share a forward
    nbytes = 0

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.hidden_shape = (hidden_size,)

    def new_cache(self) -> object:
        """Return something that holds nothing."""
        return object()

    def num_parameters(self) -> int:
        """Return none."""
        return 0

    def resident_bytes(self) -> int:
        """Return none."""
        return 0

    def __call__(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return what was given."""
        return hidden


class _EchoLoader:
    """Makes such a part."""

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        """Return next to nothing."""
        del config
        return MemoryEstimate(1, 1)

    def load_from_config(
        self, config: ModelConfig, progress: LoadProgress | None = None
    ) -> EchoPart:
        """Return the part."""
        del config, progress
        return EchoPart(self._hidden_size)


def _serve(config: DaemonConfig, manager: AsyncModelManager | None = None) -> None:
    """Serve until standard input ends."""
    with Daemon(config, manager=manager, announce=lambda _: None) as daemon:
        _say(daemon.url)
        threading.Thread(target=_stop_at_the_end, args=(daemon,), daemon=True).start()
        daemon.run()


def _stop_at_the_end(daemon: Daemon) -> None:
    sys.stdin.read()
    daemon.stop()


async def _serve_raw() -> None:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0, limit=RAW_LIMIT)
    _say(str(server.sockets[0].getsockname()[1]))
    async with server:
        await asyncio.to_thread(sys.stdin.read)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readexactly(LENGTH_BYTES)
            writer.write(head + await reader.readexactly(int.from_bytes(head, "little")))
            await writer.drain()
    except asyncio.IncompleteReadError:
        writer.close()


_ANSWERS = os.dup(sys.stdout.fileno())


def _say(line: str) -> None:
    os.write(_ANSWERS, line.encode() + b"\n")


TASKS: dict[str, Callable[..., None]] = {
    "daemon": serve_daemon,
    "echo": serve_echo,
    "raw": serve_raw,
    "static": static_batch,
}


if __name__ == "__main__":
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
