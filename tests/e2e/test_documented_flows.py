"""The calls that people know, as they know them, with a local folder for the hub's name."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core import ModelFactory, ModelRegistry, SplitModel
from splitlearn_core.quickstart import load_split_model
from splitlearn_core.utils import MemoryTracker, ShardLoader
from splitlearn_manager import AsyncModelManager, ModelConfig, ModelLoader, ModelStatus


@pytest.fixture
def qwen2(make_checkpoint: Callable[..., Any]) -> str:
    """Stand for Qwen/Qwen2-7B: sharded, six layers."""
    return str(make_checkpoint("qwen2-tied", shard_size="20KB").path)


@pytest.fixture
def gpt2(make_checkpoint: Callable[..., Any]) -> str:
    """Stand for gpt2: one file, six layers."""
    return str(make_checkpoint("gpt2").path)


def test_incremental_loading(qwen2: str) -> None:
    bottom, trunk, top = ModelFactory.create_split_models(
        model_type="qwen2",
        model_name_or_path=qwen2,
        split_point_1=2,
        split_point_2=4,
        device="cpu",
        low_memory=True,
    )

    input_ids = torch.randint(0, 97, (1, 10))
    hidden = bottom(input_ids)  # type: ignore[misc]
    hidden = trunk(hidden)  # type: ignore[misc, operator]
    output = top(hidden)  # type: ignore[misc]

    assert output.logits.shape == (1, 10, 97)


def test_verbose_loading_tells_the_memory(qwen2: str, capsys: pytest.CaptureFixture[str]) -> None:
    ModelFactory.create_split_models(
        model_type="qwen2",
        model_name_or_path=qwen2,
        split_point_1=2,
        split_point_2=4,
        device="cpu",
        low_memory=True,
        verbose=True,
    )

    printed = capsys.readouterr().out
    assert "Loading component: bottom (layers 0-1 + embedding)" in printed
    assert "RAM:" in printed
    assert "GPU:" in printed


@pytest.mark.parametrize(
    "device_map", ["auto", {"bottom": "cpu", "trunk": "cpu", "top": "cpu"}], ids=str
)
def test_device_maps(qwen2: str, device_map: Any) -> None:
    parts = ModelFactory.create_split_models(
        model_type="qwen2",
        model_name_or_path=qwen2,
        split_point_1=2,
        split_point_2=4,
        device="cpu",
        device_map=device_map,
        low_memory=True,
    )

    assert len(parts) == 3


def test_save_and_load_again(qwen2: str, tmp_path: Path) -> None:
    ModelFactory.create_split_models(
        model_type="qwen2",
        model_name_or_path=qwen2,
        split_point_1=2,
        split_point_2=4,
        device="cpu",
        low_memory=True,
        storage_path=str(tmp_path / "qwen2"),
        auto_save=True,
    )

    bottom = SplitModel.load(str(tmp_path / "qwen2/bottom.pt"))
    trunk = SplitModel.load(str(tmp_path / "qwen2/trunk.pt"))
    top = SplitModel.load(str(tmp_path / "qwen2/top.pt"))

    ids = torch.arange(7)[None]
    expected = AutoModelForCausalLM.from_pretrained(qwen2)(ids).logits
    assert torch.equal(top(trunk(bottom(ids))).logits, expected)


def test_memory_tracking(qwen2: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MemoryTracker()
    tracker.snapshot("start")
    ModelFactory.create_split_models("qwen2", qwen2, 2, 4, device="cpu", low_memory=True)
    tracker.snapshot("loaded")
    tracker.summary()

    assert "=== Memory Usage Summary ===" in capsys.readouterr().out


def test_shard_loader(qwen2: str) -> None:
    assert ShardLoader.is_sharded_model(qwen2)
    index = ShardLoader.load_index_json(qwen2)
    required_shards = ShardLoader.get_required_shards_for_component(
        index_json=index,
        component="bottom",
        layer_range=(0, 2),
        model_type="qwen2",
        include_embedding=True,
    )
    shard_paths = ShardLoader.download_shards_if_needed(
        model_path=qwen2, shard_files=required_shards
    )

    assert all(path.is_file() for path in shard_paths.values())


def test_traditional_loading_step_by_step(gpt2: str) -> None:
    full_model = AutoModelForCausalLM.from_pretrained(gpt2)
    config = AutoConfig.from_pretrained(gpt2)
    full_state_dict = full_model.state_dict()
    bottom_class = ModelRegistry.get_model_class("gpt2", "bottom")
    trunk_class = ModelRegistry.get_model_class("gpt2", "trunk")
    top_class = ModelRegistry.get_model_class("gpt2", "top")
    ids = torch.arange(7)[None]
    expected = full_model(ids).logits

    bottom = bottom_class.from_pretrained_split(full_state_dict, config, end_layer=2)
    trunk = trunk_class.from_pretrained_split(full_state_dict, config, start_layer=2, end_layer=4)
    top = top_class.from_pretrained_split(full_state_dict, config, start_layer=4)
    bottom, trunk, top = (part.to("cpu").eval() for part in (bottom, trunk, top))
    del full_model
    gc.collect()

    assert torch.equal(top(trunk(bottom(ids))).logits, expected)


def test_quickstart_with_all_its_arguments(qwen2: str, tmp_path: Path) -> None:
    bottom, trunk, top = load_split_model(
        model_type="qwen2",
        split_points=[2, 4],
        model_name_or_path=qwen2,
        cache_dir=str(tmp_path),
        device="cpu",
        low_memory=True,
        verbose=True,
    )

    assert [part.component for part in (bottom, trunk, top)] == ["bottom", "trunk", "top"]  # type: ignore[union-attr]


def gpt2_trunk(path: str) -> ModelConfig:
    return ModelConfig(
        model_id="gpt2_trunk_test",
        model_path=path,
        model_type="gpt2",
        device="cpu",
        config={"component": "trunk", "split_points": [2, 4], "cache_dir": "./models"},
    )


@pytest.mark.anyio
async def test_a_load_through_the_manager_stage_by_stage(gpt2: str) -> None:
    config = gpt2_trunk(gpt2)
    config.validate()
    manager = AsyncModelManager(max_models=5, max_workers=4)
    try:
        await asyncio.wait_for(manager.load_model(config), timeout=600.0)
        managed = await manager.get_model("gpt2_trunk_test")
        info = await manager.get_model_info("gpt2_trunk_test")
        listed = await manager.list_models()
        with pytest.raises(ValueError, match="gpt2_trunk_test"):
            await manager.load_model(config)
        async with manager.use("gpt2_trunk_test") as model:
            hidden = await model(torch.zeros(1, 4, 32))
        await manager.unload_model("gpt2_trunk_test")
        assert await manager.list_models() == []
    finally:
        await manager.shutdown()

    assert managed is not None
    assert info.status is ModelStatus.READY
    assert (info.component, info.start_layer, info.end_layer) == ("trunk", 2, 4)
    assert [item.model_id for item in listed] == ["gpt2_trunk_test"]
    assert hidden.shape == (1, 4, 32)


def test_the_loader_alone(gpt2: str) -> None:
    part = ModelLoader.load_from_config(gpt2_trunk(gpt2))

    assert (part.component, part.start_layer, part.end_layer) == ("trunk", 2, 4)
