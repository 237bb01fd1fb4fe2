"""A connection that is lost on the way: the session goes on over another one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from urllib.parse import urlsplit

import pytest
import torch
from joining import load_ends
from serving_fakes import OnePart, daemon_in_thread, trunk_config

from splitlearn_core import SplitModel
from splitlearn_manager import AsyncModelManager, ResourceManager, ServerConfig
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.errors import RemoteSessionClosed
from splitlearn_manager.config import DaemonConfig
from splitlearn_manager.server.daemon import Daemon


class Wire:
    """Goes between client and server, and can be cut.

    `cut_after(n)` cuts when the server has sent so many more bytes, which do not arrive.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # the daemon checks Host, which names the port that a client sees
        self._ports = f"127.0.0.1:{port}".encode(), f"127.0.0.1:{target[1]}".encode()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._left: int | None = None
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for pair in self._pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def cut_after(self, nbytes: int) -> None:
        self._left = nbytes

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self.connections += 1
                self._pairs.append((client, server))
                for source, sink, counted in ((client, server, False), (server, client, True)):
                    threading.Thread(
                        target=self._carry, args=(source, sink, counted), daemon=True
                    ).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(1 << 16):
                if counted and self._left is not None:
                    self._left -= len(data)
                    if self._left <= 0:
                        self._left = None
                        self.cut()
                        return
                sink.sendall(data if counted else data.replace(*self._ports))
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def part() -> SplitModel:
    return load_ends("llama")[1]


@pytest.fixture
def daemon(part: SplitModel) -> Iterator[Daemon]:
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    server = ServerConfig(port=0, session_resume_timeout=30)
    config = DaemonConfig(server=server, models=(trunk_config("trunk"),))
    with daemon_in_thread(config, manager=manager) as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    parts = urlsplit(daemon.url)
    assert parts.hostname is not None
    assert parts.port is not None
    with closing(Wire((parts.hostname, parts.port))) as wire:
        yield wire


def given(new: int, seed: int) -> torch.Tensor:
    return torch.randn(1, new, 64, generator=torch.Generator().manual_seed(seed))


def local(part: SplitModel, *steps: torch.Tensor) -> torch.Tensor:
    cache = part.new_cache()
    with torch.inference_mode():
        return [part(step, past_key_values=cache) for step in steps][-1]


@pytest.mark.parametrize("when", ["between steps", "before the answer"])
def test_a_session_goes_on(part: SplitModel, daemon: Daemon, wire: Wire, when: str) -> None:
    steps = [given(5, 0), given(1, 1), given(1, 2)]
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(steps[0], past_key_values=cache)
        if when == "between steps":
            wire.cut()
        else:
            wire.cut_after(1)
        for step in steps[1:]:
            found = trunk(step, past_key_values=cache)

    assert torch.equal(found, local(part, *steps))
    assert wire.connections > 2  # the first is for the description of the part
    steps_run = daemon.metrics.registry.get_sample_value(
        "splitlearn_session_steps_total", {"model": "trunk", "code": "ok"}
    )
    assert steps_run == len(steps)


def test_rows_are_reordered_once(part: SplitModel, wire: Wire) -> None:
    first, second = torch.cat([given(5, 0), given(5, 1)]), torch.cat([given(1, 2), given(1, 3)])
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(first, past_key_values=cache)
        wire.cut_after(1)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = trunk(second, past_key_values=cache)

    assert torch.equal(found, local(part, first[[1, 0]], second))


def test_a_goodbye_leaves_no_session_behind(daemon: Daemon) -> None:
    # The caches are held: one that is dropped gives its session back by itself.
    with RemoteTrunk(daemon.url, "trunk") as trunk, torch.inference_mode():
        first = trunk.new_cache()
        trunk(given(5, 0), past_key_values=first)
    with RemoteTrunk(daemon.url, "trunk") as trunk, torch.inference_mode():
        second = trunk.new_cache()
        trunk(given(5, 0), past_key_values=second)
        sessions = daemon.metrics.registry.get_sample_value(
            "splitlearn_sessions_open", {"model": "trunk"}
        )
    assert sessions == 1


def test_a_server_that_is_gone_is_said_to_be(wire: Wire) -> None:
    with RemoteTrunk(wire.url, "trunk") as trunk, torch.inference_mode():
        cache = trunk.new_cache()
        trunk(given(5, 0), past_key_values=cache)
        wire.close()
        with pytest.raises(RemoteSessionClosed, match="was lost, and the session with it"):
            trunk(given(1, 0), past_key_values=cache)
        with pytest.raises(RemoteSessionClosed, match="has ended"):
            trunk(given(1, 0), past_key_values=cache)
