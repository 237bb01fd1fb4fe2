"""Sessions of a Trunk whose steps are CUDA graphs; on a CPU the same steps run plainly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from serving_fakes import OnePart, Owner, daemon_in_thread, trunk_config

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.cache import PartCache
from splitlearn_core.factory import load_component
from splitlearn_core.hidden_state import HiddenState
from splitlearn_manager import AsyncModelManager, ModelConfig, ResourceManager
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.config import DaemonConfig, ServerConfig
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.observability import Metrics
from splitlearn_manager.serving import batchers
from splitlearn_manager.serving.batcher import BatchLimits
from splitlearn_manager.serving.errors import NotFiniteError
from splitlearn_manager.serving.session import Session
from splitlearn_manager.serving.sessions import SessionTable
from splitlearn_manager.serving.tensors import tensor_from_wire, tensor_to_wire
from splitlearn_manager.serving.wire import Frame, Kind, TensorName, decode

__all__ = ["make_checkpoint"]

POINTS = [2, 4]
TRUNK = {"component": "trunk", "split_points": POINTS}
GRAPHS = {"sequences": 3, "positions": 16}


@pytest.fixture
def path(make_checkpoint: Callable[..., Any]) -> Path:
    folder: Path = make_checkpoint("llama").path
    return folder


class Sessions:
    """Sessions of one Trunk, whose steps are noted that were graphs."""

    def __init__(self, part: SplitModel, table: SessionTable) -> None:
        self.part, self.table = part, table
        self.graphed: list[int] = []
        graphs = part.step_graphs
        assert graphs is not None
        self._real = graphs.step
        graphs.step = self._step  # type: ignore[method-assign]
        self.alone: dict[Session, PartCache] = {}

    def _step(self, caches: Any, *args: Any) -> torch.Tensor:
        self.graphed.append(len(caches))
        return self._real(caches, *args)

    async def open(self) -> Session:
        session = await self.table.open(Owner(), "trunk")
        self.alone[session] = PartCache(self.part.config, self.part.spec)
        return session

    async def step(self, session: Session, given: torch.Tensor, **tensors: torch.Tensor) -> float:
        """Send a step; return the largest relative error."""
        sent = [tensor_to_wire(TensorName.HIDDEN_STATES, given)]
        sent += [tensor_to_wire(TensorName[name], value) for name, value in tensors.items()]
        frame = Frame(Kind.STEP, 1, session.id, session.state.length, tensors=tuple(sent))
        self.table.claim(session.owner, session.id)
        try:
            reply = decode(await self.table.step(session, frame))
        finally:
            self.table.release(session)
        wire = reply.tensor(TensorName.HIDDEN_STATES)
        assert wire is not None
        with torch.inference_mode():
            output = self.part(given, past_key_values=self.alone[session])
        wanted = HiddenState.of(output).tensor
        return float((tensor_from_wire(wire) - wanted).abs().max() / wanted.abs().max())


def hidden(new: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, new, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
async def sessions(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    part = load_component(path, "trunk", POINTS)
    part.graph_steps(**GRAPHS)
    real = batchers._joinable  # on a GPU nothing is packed
    monkeypatch.setattr(batchers, "_joinable", lambda m: real(m)._replace(packed=False))
    manager = AsyncModelManager(
        ResourceManager(memory_limit=1 << 30), loader=OnePart(part), single_threaded=False
    )
    async with manager:
        await manager.load_model(trunk_config("trunk"))
        table = SessionTable(
            manager,
            max_sessions=8,
            idle_timeout=60,
            metrics=Metrics(),
            limits=BatchLimits(rows=8, piece=16),
        )
        async with table:
            yield Sessions(part, table)


@pytest.mark.anyio
async def test_steps_are_graphs_and_what_can_be_none_runs_beside_them(sessions: Sessions) -> None:
    opened = [await sessions.open() for _ in range(5)]
    errors = [
        await sessions.step(session, hidden(3 + n, seed=n)) for n, session in enumerate(opened)
    ]
    assert sessions.graphed == []  # prompts
    for seed in range(3):
        errors += await asyncio.gather(
            *(sessions.step(session, hidden(1, seed=seed + n)) for n, session in enumerate(opened))
        )

    assert max(errors) < 1e-5
    assert sum(sessions.graphed) == 3 * 3  # the fourth and fifth have no slot
    assert await sessions.step(opened[0], hidden(2, seed=8)) < 1e-5
    assert sum(sessions.graphed) == 3 * 3


@pytest.mark.anyio
async def test_a_session_that_outgrows_its_slot_goes_on(sessions: Sessions) -> None:
    session = await sessions.open()
    errors = [await sessions.step(session, hidden(12))]
    errors += [await sessions.step(session, hidden(1, seed=n)) for n in range(8)]

    assert max(errors) < 1e-5
    assert sessions.graphed == [1] * 4


@pytest.mark.anyio
async def test_a_graph_that_fails_is_logged_and_the_steps_run_as_they_are(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = [await sessions.open() for _ in range(2)]
    for n, session in enumerate(opened):
        await sessions.step(session, hidden(3 + n))

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(sessions.part.step_graphs, "step", fails)
    with caplog.at_level(logging.ERROR):
        errors = await asyncio.gather(*(sessions.step(s, hidden(1)) for s in opened))

    assert max(errors) < 1e-5
    assert "a step of trunk as a CUDA graph failed, and is run as it is" in caplog.text
    assert "out of memory" in caplog.text


@pytest.mark.anyio
async def test_a_step_whose_answer_is_no_number_fails_alone(sessions: Sessions) -> None:
    marked, other = await sessions.open(), await sessions.open()
    for session in (marked, other):
        await sessions.step(session, hidden(3))

    def spoil(module: Any, args: Any, output: Any) -> torch.Tensor:
        del module
        found = HiddenState.of(output).tensor
        return found.masked_fill(HiddenState.of(args[0]).tensor[..., :1] == 77, torch.nan)

    given = hidden(1)
    given[0, 0, 0] = 77
    hook = sessions.part.register_forward_hook(spoil)
    try:
        outcomes = await asyncio.gather(
            sessions.step(marked, given), sessions.step(other, hidden(1)), return_exceptions=True
        )
    finally:
        hook.remove()

    assert sum(sessions.graphed) == 2
    assert isinstance(outcomes[0], NotFiniteError)
    assert "position 3" in str(outcomes[0])
    assert isinstance(outcomes[1], float)
    assert outcomes[1] < 1e-5


def config(path: Path, device: str = "cuda", graphs: Any = GRAPHS, **part: Any) -> ModelConfig:
    return ModelConfig(
        "trunk", str(path), device=device, config={**TRUNK, "cuda_graphs": graphs, **part}
    )


@pytest.mark.parametrize(
    ("graphs", "changes", "said"),
    [
        (GRAPHS, {"device": "cpu"}, r"config\.cuda_graphs: is for a GPU .*, not for cpu"),
        (GRAPHS, {"component": "bottom"}, r"config\.cuda_graphs: is for a Trunk.*not for bottom"),
        ({"sequences": 0}, {}, r"config\.cuda_graphs\.sequences: must be 1 or more, found 0"),
        ({"positions": "many"}, {}, r"config\.cuda_graphs\.positions"),
        ({"slots": 4}, {}, r"config\.cuda_graphs\.slots"),
        (True, {}, r"config\.cuda_graphs: must be a mapping"),
    ],
)
def test_a_setting_that_can_not_be(
    path: Path, graphs: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        config(path, graphs=graphs, **changes).validate()


def test_without_sizes_there_are_sixteen_sequences(path: Path) -> None:
    found = config(path, graphs={})
    found.validate()
    assert found.part.cuda_graphs is not None
    assert (found.part.cuda_graphs.sequences, found.part.cuda_graphs.positions) == (16, 4096)
    assert ModelConfig.from_dict(found.to_dict()) == found
    assert config(path, graphs=None).part.cuda_graphs is None


def test_a_load_takes_the_memory_that_it_estimates(path: Path) -> None:
    on_cpu = config(path, device="cpu")  # not validated, which would refuse it
    estimate = ModelLoader.estimate(on_cpu)
    plain = ModelLoader.estimate(config(path, device="cpu", graphs=None))
    part = ModelLoader.load_from_config(on_cpu)

    cache = part.new_cache()
    with torch.inference_mode():
        part(hidden(2), past_key_values=cache)
    assert part.step_graphs.takes(cache)
    storages = [layer.keys.untyped_storage() for layer in cache.layers if layer.keys is not None]
    storages += [layer.values.untyped_storage() for layer in cache.layers if layer.keys is not None]
    assert estimate.steady_bytes - plain.steady_bytes == sum(s.nbytes() for s in storages)


@pytest.mark.gpu
def test_clients_of_a_trunk_with_cuda_graphs_get_their_own_tokens(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bottom, top = (load_component(path, name, POINTS) for name in ("bottom", "top"))
    local = SplitCausalLM(bottom, load_component(path, "trunk", POINTS, device="cuda"), top)
    prompts = [torch.arange(3, 3 + length)[None] for length in (2, 5, 9, 4, 7)]
    asked = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    daemon = DaemonConfig(server=ServerConfig(port=0), models=(config(path),))

    def remote(prompt: torch.Tensor, url: str) -> list[list[int]]:
        first, last = (load_component(path, name, POINTS) for name in ("bottom", "top"))
        with RemoteTrunk(url, "trunk") as trunk:
            tokens: list[list[int]] = (
                SplitCausalLM(first, trunk, last).generate(prompt, **asked).tolist()
            )
            return tokens

    with daemon_in_thread(daemon) as running, ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(remote, prompts, [str(running.url)] * len(prompts)))

    assert found == [local.generate(prompt, **asked).tolist() for prompt in prompts]
    assert "as a CUDA graph failed" not in caplog.text
