"""A Trunk whose forwards wait where a test tells them to, a manager that has it, and a daemon."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import torch

from splitlearn_core import SplitModel
from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager import AsyncModelManager, ModelConfig, ResourceManager
from splitlearn_manager.config import DaemonConfig, ServerConfig
from splitlearn_manager.server.daemon import Daemon
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.wire import CloseReason


def trunk_config(model_id: str, **changes: Any) -> ModelConfig:
    """Return the configuration of a model that `FakeLoader` makes; `name?` is not preloaded."""
    part = {"component": "trunk", "split_points": [1, 3]}
    name = model_id.removesuffix("?")
    return ModelConfig(name, "nowhere", **{"config": part, "preload": name == model_id, **changes})


class FakeCache:
    """Counts positions."""

    def __init__(self) -> None:
        self.length = 0


class FakeConfig:
    """What metadata is made of."""

    model_type = "fake"
    vocab_size = 11

    def get_text_config(self, *, decoder: bool) -> FakeConfig:
        """Return itself: there is but one."""
        del decoder
        return self


class FakePart:
    """Doubles its input, remembers how it was called, and can be held in the middle of it.

    `gate.clear()` holds forwards after they have begun; `entered` tells that one has.
    """

    start_layer = 1
    end_layer = 3
    dtype = torch.float32
    device = torch.device("cpu")
    nbytes = 80
    num_layers = 5
    hidden_size = 4
    hidden_shape = (4,)
    side_inputs = ()
    side_outputs = ()
    max_positions = 16
    drops_positions = True  # its steps run one by one

    def __init__(self, component: str = "trunk") -> None:
        self.component = component
        self.config = FakeConfig()
        self.calls: list[dict[str, Any]] = []
        self.fail_with: BaseException | None = None
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self.dtype

    def num_parameters(self) -> int:
        return 20

    def resident_bytes(self) -> int:
        return 80

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def __call__(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls.append(kwargs)
        self.entered.release()
        assert self.gate.wait(30), "the test never opened the gate"
        if self.fail_with is not None:
            raise self.fail_with
        cache = kwargs.get("past_key_values")
        if cache is not None:  # requests without a session have none
            cache.length += inputs.shape[1]
        return inputs * 2


class FakeLoader:
    """Gives a `FakePart` for every model, named after its id.

    The model `broken` fails to load; `gate.clear()` holds the load of `late` in its middle.
    """

    def __init__(self) -> None:
        self.parts: dict[str, FakePart] = {}
        self.gate = threading.Event()
        self.gate.set()

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        del config
        return MemoryEstimate(100, 80)

    def load_from_config(self, config: ModelConfig, progress: Any = None) -> FakePart:
        del progress
        if config.model_id == "late":
            assert self.gate.wait(30), "the test never opened the gate"
        if config.model_id == "broken":
            raise ValueError("the weights are cut off")
        part = FakePart(config.model_id)
        self.parts[config.model_id] = part
        return part


class OnePart:
    """Loads a real part that is there already."""

    def __init__(self, part: SplitModel) -> None:
        self.part = part

    def estimate(self, config: ModelConfig) -> MemoryEstimate:
        del config
        return MemoryEstimate(100, 80)

    def load_from_config(self, config: ModelConfig, progress: Any = None) -> SplitModel:
        del config, progress
        return self.part


class Owner:
    """Owns sessions, and remembers why they ended."""

    def __init__(self) -> None:
        self.heard: list[CloseReason] = []

    def session_closed(self, session: Session, reason: CloseReason) -> None:
        del session
        self.heard.append(reason)


def hidden(new: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Return hidden states of a small model."""
    return torch.randn(rows, new, 64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    url: str,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """Send a request."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=30)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


@dataclass
class Served:
    """A daemon that serves in this event loop."""

    daemon: Daemon
    serving: asyncio.Task[int]
    announced: asyncio.Queue[str]
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.daemon.url

    def sessions_url(self, model_id: str = "trunk") -> str:
        return f"{self.url.replace('http', 'ws', 1)}/v2/models/{model_id}/sessions"

    def sessions_open(self) -> float:
        return self.metric("splitlearn_sessions_open")

    def steps(self, code: str) -> float:
        return self.metric("splitlearn_session_steps_total", code=code)

    def metric(self, name: str, **labels: str) -> float:
        labels = {"model": "trunk", **labels}
        return self.daemon.metrics.registry.get_sample_value(name, labels) or 0.0

    async def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> Answer:
        """Send a request, with `Content_Type="text/plain"` and the like as its headers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await asyncio.to_thread(ask, self.url, path, method, body, named)

    async def line(self) -> str:
        """Return the next line that the daemon announces."""
        self.lines.append(await asyncio.wait_for(self.announced.get(), 30))
        return self.lines[-1]

    async def stop(self) -> int:
        self.daemon.stop()
        return await self.serving


@contextmanager
def daemon_in_thread(
    config: DaemonConfig, *, manager: AsyncModelManager | None = None
) -> Iterator[Daemon]:
    """Run a daemon in a thread of its own, as a client sees it: from ready to the end."""
    lines: queue.Queue[str] = queue.Queue()
    with Daemon(config, manager=manager, announce=lines.put) as daemon:
        thread = threading.Thread(target=daemon.run, name="daemon")
        thread.start()
        try:
            assert lines.get(timeout=60).startswith("splitlearn: listening")
            assert lines.get(timeout=60).startswith("splitlearn: ready")
            yield daemon
        finally:
            daemon.stop()
            thread.join(60)
    assert not thread.is_alive()


@contextmanager
def fake_daemon(loader: FakeLoader, *model_ids: str, **server: Any) -> Iterator[Daemon]:
    """Run a daemon in a thread, with models that `loader` makes."""
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 20), loader=loader, single_threaded=False
    )
    config = DaemonConfig(
        server=ServerConfig(**{"port": 0, **server}),
        models=tuple(map(trunk_config, model_ids or ("trunk",))),
    )
    with daemon_in_thread(config, manager=manager) as daemon:
        yield daemon
        loader.gate.set()
        loader.parts.clear()
