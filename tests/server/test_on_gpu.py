"""A daemon with its Trunk on a GPU; each test also runs with one on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from infer_requests import call, tensor
from serving_fakes import daemon_in_thread
from typer.testing import CliRunner

from splitlearn_core import SplitCausalLM, SplitModel
from splitlearn_core.factory import load_component
from splitlearn_manager import AsyncModelManager, ModelConfig, ModelStatus
from splitlearn_manager.cli import app
from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.config import DaemonConfig, ServerConfig
from splitlearn_manager.errors import ConfigError, ModelFailedError

__all__ = ["make_checkpoint"]

POINTS = [2, 4]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
TRUNK = {"component": "trunk", "split_points": POINTS}
DAEMON = """\
models:
  - {{model_id: trunk, model_path: '{path}', device: cuda,
      config: {{component: trunk, split_points: [2, 4]}}}}
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(make_checkpoint: Callable[..., Any]) -> Path:
    folder: Path = make_checkpoint("llama").path
    return folder


@pytest.fixture
def serve(path: Path, device: str) -> Iterator[Callable[..., str]]:
    """Return a function that serves the Trunk on the device, in a dtype."""
    running: list[Any] = []

    def start(dtype: str, **server: Any) -> str:
        model = ModelConfig("trunk", str(path), device=device, dtype=dtype, config=TRUNK)
        config = DaemonConfig(server=ServerConfig(port=0, **server), models=(model,))
        daemon = daemon_in_thread(config)
        running.append(daemon)
        return str(daemon.__enter__().url)

    yield start
    for daemon in running:
        daemon.__exit__(None, None, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_of_a_session_are_those_of_the_part_there(
    serve: Callable[..., str], path: Path, device: str, dtype: str
) -> None:
    url = serve(dtype)
    part = load_component(path, "trunk", POINTS, device=device, dtype=dtype)
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).to(part.dtype)
    cache = part.new_cache()

    with RemoteTrunk(url, "trunk") as remote, torch.no_grad():
        own = remote.new_cache()
        for piece in hidden.split([5, 1, 1, 1], dim=1):
            found = remote(piece, past_key_values=own, use_cache=True)
            expected = part(piece, past_key_values=cache, use_cache=True)
            assert found.device.type == "cpu"
            assert torch.equal(found, expected.cpu())


def test_clients_that_share_forwards_get_their_own_tokens(
    serve: Callable[..., str], path: Path, device: str
) -> None:
    url = serve("float32")
    bottom, top = (load_component(path, name, POINTS) for name in ("bottom", "top"))
    local = SplitCausalLM(bottom, load_component(path, "trunk", POINTS, device=device), top)
    prompts = [torch.arange(3, 3 + length)[None] for length in (2, 5, 9, 14)]
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def remote(prompt: torch.Tensor) -> list[list[int]]:
        ends = (load_component(path, name, POINTS) for name in ("bottom", "top"))
        first, last = ends
        with RemoteTrunk(url, "trunk") as trunk:
            tokens: list[list[int]] = (
                SplitCausalLM(first, trunk, last).generate(prompt, **asked).tolist()
            )
            return tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(remote, prompts))

    assert found == [local.generate(prompt, **asked).tolist() for prompt in prompts]


def test_infer_answers_with_what_the_part_gives_there(
    serve: Callable[..., str], path: Path, device: str
) -> None:
    url = serve("float32")
    part = load_component(path, "trunk", POINTS, device=device)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))

    answer = call("http", url, "trunk", [tensor("hidden_states", hidden.numpy())])

    with torch.no_grad():
        expected = part(hidden).cpu()
    assert torch.equal(torch.from_numpy(answer.as_numpy("hidden_states").copy()), expected)


@pytest.mark.anyio
async def test_a_model_says_where_it_is_and_leaves_nothing_there(path: Path, device: str) -> None:
    def used() -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else 0

    before = used()
    async with AsyncModelManager(single_threaded=False) as manager:
        config = ModelConfig("trunk", str(path), device=device, dtype="bfloat16", config=TRUNK)
        await manager.load_model(config)
        info = await manager.get_model_info("trunk")
        (usage,) = [
            manager.resource_manager.get_current_usage(name)
            for name in manager.resource_manager.devices()
            if name.startswith(device)
        ]
        async with manager.use("trunk") as managed:
            assert isinstance(managed.model, SplitModel)
            assert managed.model.device.type == device
        del managed
        held = used()
        await manager.unload_model("trunk")

    assert (info.status, info.device, info.dtype) == (ModelStatus.READY, device, "bfloat16")
    assert info.resident_bytes
    assert usage.reserved_bytes >= info.resident_bytes
    assert (held > before) == (device == "cuda")
    assert used() == before


@no_gpu
def test_a_daemon_does_not_start_for_a_gpu_that_is_not_there(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "daemon.yaml"
    file.write_text(DAEMON.format(path=path))

    result = CliRunner().invoke(app, ["serve", "--config", str(file), "--port", "0"])

    assert isinstance(result.exception, ConfigError)  # the command's main ends with 2 for it
    assert "trunk: device cuda is not there: this machine has cpu" in str(result.exception)


@no_gpu
@pytest.mark.anyio
async def test_a_load_for_a_gpu_that_is_not_there_fails_and_says_so(path: Path) -> None:
    async with AsyncModelManager(single_threaded=False) as manager:
        config = ModelConfig("trunk", str(path), device="cuda", config=TRUNK)
        with pytest.raises(
            ModelFailedError, match="device cuda is not there: this machine has cpu"
        ):
            await manager.load_model(config)
