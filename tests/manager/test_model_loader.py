"""The real loader, on a real (if tiny) model."""

from __future__ import annotations

import logging
import shutil
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from splitlearn_core.errors import CheckpointError
from splitlearn_core.estimate import MemoryEstimate
from splitlearn_manager import AsyncModelManager, ModelConfig, ModelLoader, ResourceManager
from splitlearn_manager.core.model_loader import warm_up
from splitlearn_manager.core.progress import LoadProgress
from splitlearn_manager.core.states import LoadPhase
from splitlearn_manager.errors import (
    InsufficientResourcesError,
    LoadCancelledError,
    ModelFailedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POINTS = [2, 5]


@pytest.fixture
def part(tiny_checkpoint: Path) -> Callable[..., ModelConfig]:
    """Return a function that makes the configuration of a part of the tiny model."""

    def make(component: str | None = None, **changes: Any) -> ModelConfig:
        options = {} if component is None else {"component": component, "split_points": POINTS}
        values = {"model_path": str(tiny_checkpoint), "config": options, **changes}
        return ModelConfig(component or "model", **values)

    return make


@pytest.mark.anyio
async def test_parts_of_a_manager_are_the_whole_model(part: Callable[..., ModelConfig]) -> None:
    ids = torch.arange(12).reshape(2, 6)
    async with AsyncModelManager() as manager:
        for component in ("bottom", "trunk", "top", "full"):
            await manager.load_model(part(component, warmup=True))

        hidden = await manager.infer("bottom", ids)
        hidden = await manager.infer("trunk", hidden)
        output = await manager.infer("top", hidden)
        whole = await manager.infer("full", ids)

    assert torch.equal(output.logits, whole.logits)
    assert not output.logits.requires_grad


@pytest.mark.anyio
async def test_a_part_is_described_measured_and_freed(part: Callable[..., ModelConfig]) -> None:
    async with AsyncModelManager() as manager:
        await manager.load_model(part("trunk", dtype="bfloat16"))
        async with manager.use("trunk") as managed:
            size = managed.model.resident_bytes()
            freed = weakref.ref(managed.model)
        info = await manager.get_model_info("trunk")
        await manager.unload_model("trunk")

        assert freed() is None
        assert manager.resource_manager.get_current_usage().reserved_bytes == 0
    assert (info.component, info.start_layer, info.end_layer) == ("trunk", 2, 5)
    assert (info.device, info.dtype) == ("cpu", "bfloat16")
    assert info.resident_bytes == info.reserved_bytes == size > 0


@pytest.mark.parametrize("model_type", ["auto", "llama", "huggingface"])
def test_types_of_one_checkpoint(part: Callable[..., ModelConfig], model_type: str) -> None:
    config = part(model_type=model_type)

    model = ModelLoader.load_from_config(config)

    assert model.component == "full"
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 97)
    assert ModelLoader().estimate(config).steady_bytes >= model.num_parameters() * 4


@pytest.mark.anyio
async def test_a_warm_up_counts_where_a_load_is_admitted(
    part: Callable[..., ModelConfig],
) -> None:
    cold, warm = (ModelLoader.estimate(part("trunk", warmup=warmup)) for warmup in (False, True))
    assert warm.steady_bytes == cold.steady_bytes
    assert warm.peak_bytes == warm.steady_bytes + warm.warm_up_bytes > cold.peak_bytes

    limit = ResourceManager(memory_limit=warm.peak_bytes - 1)
    async with AsyncModelManager(limit) as manager:
        with pytest.raises(InsufficientResourcesError):
            await manager.load_model(part("trunk", warmup=True))
        assert await manager.load_model(part("trunk"))


def test_pytorch_reads_a_state_dict_with_its_config_beside_it(
    part: Callable[..., ModelConfig], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    torch.save(load_file(tiny_checkpoint / "model.safetensors"), tmp_path / "model.pt")
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    config = part("trunk", model_type="pytorch", model_path=str(tmp_path / "model.pt"))
    config.validate()

    model = ModelLoader.load_from_config(config)

    hidden = torch.ones(1, 3, 32)
    with torch.no_grad():
        assert torch.equal(model(hidden), ModelLoader.load_from_config(part("trunk"))(hidden))


def test_pytorch_refuses_what_is_not_only_weights(
    part: Callable[..., ModelConfig], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    torch.save({"model": types.SimpleNamespace()}, tmp_path / "model.pt")
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)

    with pytest.raises(CheckpointError, match=r"model\.pt"):
        ModelLoader.load_from_config(
            part("trunk", model_type="pytorch", model_path=str(tmp_path / "model.pt"))
        )


def test_a_pipeline_is_the_clients_to_load(
    part: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = types.ModuleType("splitlearn_manager.client.pipeline")
    client.load_pipeline = lambda config, progress: ("pipeline", config, progress)  # type: ignore[attr-defined]
    client.estimate_pipeline = lambda config: MemoryEstimate(7, len(config.model_id))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, client.__name__, client)
    options = {"split_points": POINTS, "trunk": "http://127.0.0.1:1"}
    config = part(model_type="pipeline", config=options)
    progress = LoadProgress()

    assert ModelLoader.estimate(config) == MemoryEstimate(7, 5)
    assert ModelLoader.load_from_config(config, progress) == ("pipeline", config, progress)


@pytest.mark.parametrize(
    ("changes", "cause", "message"),
    [
        ({"model_path": "nowhere/at/all"}, FileNotFoundError, "nowhere/at/all"),
        ({"model_type": "gpt2"}, ValueError, "is a llama model, not gpt2"),
        (
            {"config": {"component": "trunk", "split_points": [2, 9]}},
            ValueError,
            "the model has 6 layers",
        ),
    ],
)
@pytest.mark.anyio
async def test_what_does_not_fit_the_model_is_told(
    part: Callable[..., ModelConfig],
    changes: dict[str, Any],
    cause: type[Exception],
    message: str,
) -> None:
    async with AsyncModelManager() as manager:
        with pytest.raises(ModelFailedError, match=message) as caught:
            await manager.load_model(part("trunk", **changes))

        assert isinstance(caught.value.__cause__, cause)
        assert message in ((await manager.get_model_info("trunk")).error or "")


@pytest.mark.parametrize("component", ["bottom", "trunk", "top", "full"])
def test_warm_up_has_an_input_that_fits(part: Callable[..., ModelConfig], component: str) -> None:
    model = ModelLoader.load_from_config(part(component, dtype="bfloat16"))
    inputs: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    warm_up(model)

    (given,) = inputs
    if component in {"bottom", "full"}:
        assert (given.shape, given.dtype) == ((1, 8), torch.long)
    else:
        assert (given.shape, given.dtype) == ((1, 8, 32), torch.bfloat16)


def test_warm_up_is_done_only_when_asked_for_and_its_failure_fails_the_load(
    part: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any) -> None:
        raise RuntimeError(f"no kernel for {model.component}")

    monkeypatch.setattr("splitlearn_manager.core.model_loader.warm_up", fail)
    progress = LoadProgress()

    ModelLoader.load_from_config(part("trunk"))
    with pytest.raises(RuntimeError, match="no kernel for trunk"):
        ModelLoader.load_from_config(part("trunk", warmup=True), progress)

    assert progress.phase is LoadPhase.WARMING_UP


def test_progress_counts_all_bytes_and_can_end_the_load(
    part: Callable[..., ModelConfig],
) -> None:
    progress = LoadProgress()

    model = ModelLoader.load_from_config(part("trunk"), progress)

    assert progress.bytes_done == progress.bytes_total == model.num_parameters() * 4
    progress.stop(LoadCancelledError("enough"))
    with pytest.raises(LoadCancelledError, match="enough"):
        ModelLoader.load_from_config(part("trunk"), progress)


def test_verbose_logs_what_was_loaded(
    part: Callable[..., ModelConfig], caplog: pytest.LogCaptureFixture, tiny_checkpoint: Path
) -> None:
    caplog.set_level(logging.INFO, "splitlearn_manager")

    ModelLoader.load_from_config(part())
    ModelLoader.load_from_config(part(config={"verbose": True}))

    assert caplog.messages == [f"model model was loaded from {tiny_checkpoint}"]
