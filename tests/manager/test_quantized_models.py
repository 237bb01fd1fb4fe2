"""Models with packed weights in a manager: configuration, admission, reload, unload."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core.linear_kernels import KERNELS
from splitlearn_core.packed_linear import PackedLinear
from splitlearn_manager import AsyncModelManager, ModelConfig, ModelLoader, ResourceManager
from splitlearn_manager.errors import (
    ConfigError,
    InsufficientResourcesError,
    ModelFailedError,
)

POINTS = [2, 5]


@pytest.fixture
def trunk(tiny_checkpoint: Path) -> Callable[..., ModelConfig]:
    """Return a function that makes the configuration of a Trunk of the tiny model."""

    def make(quantization: str | None = None, **changes: Any) -> ModelConfig:
        options = {"component": "trunk", "split_points": POINTS, "quantization": quantization}
        config = ModelConfig("trunk", str(tiny_checkpoint), config=options, **changes)
        config.validate()
        return config

    return make


@pytest.mark.parametrize("quantization", ["int4", "auto", "none", "INT8", True, 8])
def test_a_value_that_there_is_not(trunk: Callable[..., ModelConfig], quantization: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.quantization"):
        trunk(quantization)


@pytest.mark.parametrize(
    ("quantization", "changes", "message"),
    [
        ("int8", {"dtype": "float16"}, "int8 computes in float32 or bfloat16, not in float16"),
        ("fp16", {"dtype": "float16"}, "fp16 computes in float32, not in float16"),
        ("prepacked", {"dtype": "float16"}, "prepacked computes in float32 or bfloat16, not"),
        ("int8", {"device": "cuda"}, "int8 is for the cpu, not for cuda"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    trunk: Callable[..., ModelConfig], quantization: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.quantization.*{message}"):
        trunk(quantization, **changes)


def test_a_pipeline_takes_it_for_its_ends(tiny_checkpoint: Path) -> None:
    options = {"split_points": POINTS, "trunk": "http://localhost:1", "quantization": "int8"}
    config = ModelConfig("pipe", str(tiny_checkpoint), "pipeline", config=options)

    packed = ModelLoader.estimate(config)

    plain = ModelConfig(
        "pipe", str(tiny_checkpoint), "pipeline", config=options | {"quantization": None}
    )
    assert packed != ModelLoader.estimate(plain)


@pytest.mark.anyio
@pytest.mark.parametrize("quantization", ["prepacked", "fp16", "int8"])
async def test_what_is_reserved_is_what_it_holds(
    trunk: Callable[..., ModelConfig], quantization: str
) -> None:
    hidden = torch.randn(1, 4, 32)
    async with AsyncModelManager() as manager:
        await manager.load_model(trunk(quantization, warmup=True))
        info = await manager.get_model_info("trunk")
        output = await manager.infer("trunk", hidden)
        async with manager.use("trunk") as managed:
            size = managed.model.nbytes

    assert info.quantization == quantization
    assert info.dtype == "float32"
    assert info.resident_bytes == info.reserved_bytes == size
    assert info.predicted_bytes == pytest.approx(size, rel=0.01)
    assert (output.shape, output.dtype) == ((1, 4, 32), torch.float32)


@pytest.mark.anyio
async def test_a_load_that_does_not_fit_at_its_worst_is_refused(
    trunk: Callable[..., ModelConfig],
) -> None:
    estimate = ModelLoader.estimate(trunk("fp16"))
    assert estimate.steady_bytes < estimate.peak_bytes

    for limit, fits in ((estimate.peak_bytes - 1, False), (estimate.peak_bytes, True)):
        async with AsyncModelManager(ResourceManager(memory_limit=limit)) as manager:
            if not fits:
                with pytest.raises(InsufficientResourcesError):
                    await manager.load_model(trunk("fp16"))
                continue
            await manager.load_model(trunk("fp16"))
            held = manager.resource_manager.get_current_usage().reserved_bytes
            assert held == pytest.approx(estimate.steady_bytes, rel=0.01)


@pytest.mark.anyio
async def test_a_reload_packs_and_the_old_one_goes_and_so_does_the_new_one(
    trunk: Callable[..., ModelConfig],
) -> None:
    hidden = torch.randn(1, 4, 32)
    async with AsyncModelManager() as manager:
        await manager.load_model(trunk())
        plain = await manager.infer("trunk", hidden)
        assert (await manager.get_model_info("trunk")).quantization is None

        await manager.reload_model(trunk("int8"))
        packed = await manager.infer("trunk", hidden)
        assert (await manager.get_model_info("trunk")).quantization == "int8"
        async with manager.use("trunk") as managed:
            modules = managed.model.modules()
            layers = [weakref.ref(m) for m in modules if isinstance(m, PackedLinear)]
            del modules
        assert len(layers) == 3 * 7

        assert await manager.unload_model("trunk")
        assert all(layer() is None for layer in layers)
        assert manager.resource_manager.get_current_usage().reserved_bytes == 0

    error = (packed - plain).norm() / plain.norm()
    assert 0 < error < 0.05


@pytest.mark.anyio
async def test_loads_side_by_side_test_a_kernel_together(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitlearn_core.linear_kernels._tested", set())
    configs = [
        ModelConfig(f"m{n}", str(tiny_checkpoint), config={"quantization": kind})
        for n, kind in enumerate(["int8", "fp16", "prepacked", "int8"])
    ]
    async with AsyncModelManager() as manager:
        await asyncio.gather(*map(manager.load_model, configs))

        kinds = {info.model_id: info.quantization for info in await manager.list_models()}
    assert kinds == {"m0": "int8", "m1": "fp16", "m2": "prepacked", "m3": "int8"}


@pytest.mark.anyio
async def test_a_machine_that_can_not_says_so_and_nothing_is_loaded_in_its_stead(
    trunk: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("didn't find engine for operation quantized::linear_prepack")

    monkeypatch.setattr("splitlearn_core.linear_kernels._tested", set())
    monkeypatch.setattr(KERNELS["int8"], "pack", missing)
    async with AsyncModelManager() as manager:
        with pytest.raises(ModelFailedError, match=r"int8 can't be used here.*didn't find engine"):
            await manager.load_model(trunk("int8"))

        info = await manager.get_model_info("trunk")
        assert info.status == "failed"
        assert manager.resource_manager.get_current_usage().reserved_bytes == 0
