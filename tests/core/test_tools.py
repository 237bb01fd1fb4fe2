"""The tools around parts: shards, names, memory, storage, devices, headers."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from splitlearn_core.builder import draw
from splitlearn_core.devices import auto_device_map, resolve_devices
from splitlearn_core.errors import CheckpointError
from splitlearn_core.factory import find_model
from splitlearn_core.headers import MAX_HEADER_BYTES, read_header, read_index
from splitlearn_core.loading.opening import open_source
from splitlearn_core.plan import SplitPlan
from splitlearn_core.utils import MemoryTracker, ParamMapper, ShardLoader, StorageManager
from splitlearn_core.utils.threads import configure_pytorch_threads

BALLAST_BYTES = 96 * 2**20


def test_shards_that_a_component_needs(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("qwen2-tied", shard_size="20KB").path
    assert ShardLoader.is_sharded_model(path)
    index = ShardLoader.load_index_json(path)
    weight_map = index["weight_map"]

    bottom = ShardLoader.get_required_shards_for_component(
        index, "bottom", (0, 2), "qwen2", include_embedding=True
    )
    top = ShardLoader.get_required_shards_for_component(index, "top", (4, 6), "qwen2")

    assert bottom == {
        file
        for name, file in weight_map.items()
        if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))
    }
    assert weight_map["model.embed_tokens.weight"] in top, "a tied head is the embedding"
    assert weight_map["model.norm.weight"] in top
    paths = ShardLoader.download_shards_if_needed(path, bottom)
    assert paths == {name: path / name for name in bottom}


RENAMED = ["gemma3", "fuyu", "nemotron_h"]  # other names on disk than in the module
TIED = ["bert", "gemma4", "modernbert-decoder", "gpt2"]  # the head shares one of several embeddings
SHARED = ["zaya"]  # every part has some


@pytest.mark.parametrize("model_type", [*RENAMED, *TIED, *SHARED])
def test_shards_are_those_that_loading_needs(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path, max_shard_size="5KB")
    index = ShardLoader.load_index_json(tmp_path)
    model = find_model(tmp_path)

    with closing(open_source(model.files)) as source:
        for spec in SplitPlan.from_split_points(6, [2, 4]).components:
            needed = draw(model.config, spec, source, "", model.family).reads.stored
            found = ShardLoader.get_required_shards_for_component(
                index, spec.kind, (spec.start_layer, spec.end_layer), model_type
            )
            assert found == {index["weight_map"][name] for name in needed}


@pytest.mark.parametrize(
    ("name", "model_type", "layer"),
    [
        ("language_model.model.layers.37.mlp.up_proj.weight", "gemma3", 37),
        ("language_model.model.layers.11.mlp.dense_h_to_4h.weight", "fuyu", 11),
        ("backbone.layers.51.mixer.A_log", "nemotron_h", 51),
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", "gemma3", -1),
        ("nobody.knows.7.this", "gemma3", -1),
    ],
)
def test_layers_of_names_that_only_the_disk_has(name: str, model_type: str, layer: int) -> None:
    assert ParamMapper.get_layer_number(name, model_type) == layer
    if layer > 0:
        moved = ParamMapper.remap_layer_index(name, 2, model_type)
        assert moved == name.replace(str(layer), str(layer - 2))


def test_ends_of_names_that_only_the_disk_has() -> None:
    assert ParamMapper.is_embedding("language_model.model.embed_tokens.weight", "gemma3")
    assert ParamMapper.is_final_norm("language_model.model.norm.weight", "gemma3")
    assert ParamMapper.is_lm_head("language_model.lm_head.weight", "gemma3")
    assert not ParamMapper.is_final_norm("multi_modal_projector.mm_soft_emb_norm.weight", "gemma3")


def test_part_of_a_shard(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path / "model.safetensors"

    tensors = ShardLoader.load_shard_partial(
        path, lambda name: ParamMapper.get_layer_number(name, "llama") == 3
    )

    assert len(tensors) == 9
    assert all(".layers.3." in name for name in tensors)


def test_not_sharded(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path

    assert not ShardLoader.is_sharded_model(path)
    with pytest.raises(FileNotFoundError, match="not sharded"):
        ShardLoader.load_index_json(path)


@pytest.mark.parametrize(
    ("name", "model_type", "layer"),
    [
        ("transformer.h.11.attn.c_attn.weight", "gpt2", 11),
        ("h.3.ln_1.bias", "gpt2", 3),
        ("wte.weight", "gpt2", -1),
        ("model.layers.7.mlp.up_proj.weight", "qwen2", 7),
        ("lm_head.weight", "llama", -1),
    ],
)
def test_layer_numbers(name: str, model_type: str, layer: int) -> None:
    assert ParamMapper.get_layer_number(name, model_type) == layer


def test_ends_by_name() -> None:
    assert ParamMapper.is_embedding("wpe.weight", "gpt2")
    assert ParamMapper.is_final_norm("transformer.ln_f.bias", "gpt2")
    assert ParamMapper.is_lm_head("lm_head.weight", "gpt2")
    assert not ParamMapper.is_lm_head("transformer.ln_f.bias", "gpt2")
    assert not ParamMapper.is_embedding("model.layers.0.input_layernorm.weight", "llama")


def test_layer_numbers_can_be_moved() -> None:
    moved = ParamMapper.remap_layer_index("model.layers.8.mlp.up_proj.weight", 8, "llama")

    assert moved == "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="layer number"):
        ParamMapper.remap_layer_index("lm_head.weight", 8, "llama")


def test_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MemoryTracker()
    tracker.snapshot("start")
    # A mapping of its own: what malloc hands out may be memory that the process already had.
    with mmap.mmap(-1, BALLAST_BYTES) as ballast:
        ballast.write(b"x" * BALLAST_BYTES)
        tracker.snapshot("loaded")
    tracker.report()
    tracker.summary()

    grown = tracker.snapshots[1].ram_bytes - tracker.snapshots[0].ram_bytes
    assert grown > 0.5 * BALLAST_BYTES  # not all: other tests' leftovers may be freed meanwhile
    printed = capsys.readouterr().out
    assert "Peak RAM:" in printed
    assert "Memory: loaded" in printed
    assert tracker.get_current_usage()["ram_gb"] > 0


def test_storage_paths(tmp_path: Path) -> None:
    folders = StorageManager.create_storage_directories(tmp_path / "qwen2")

    assert set(folders) == {"bottom", "trunk", "top"}
    assert all(folder.is_dir() for folder in folders.values())
    assert StorageManager.get_split_model_path(tmp_path, "top") == tmp_path / "top"


@pytest.mark.parametrize(
    ("count", "devices"),
    [
        (0, ["cpu", "cpu", "cpu"]),
        (1, ["cpu", "cuda:0", "cuda:0"]),
        (2, ["cpu", "cuda:0", "cuda:1"]),
        (3, ["cuda:0", "cuda:1", "cuda:2"]),
        (8, ["cuda:0", "cuda:1", "cuda:2"]),
    ],
)
def test_automatic_devices(count: int, devices: list[str]) -> None:
    assert list(auto_device_map(count).values()) == devices


def test_device_map_with_an_unknown_part() -> None:
    plan = SplitPlan.from_split_points(6, [2, 4])

    with pytest.raises(ValueError, match="middle"):
        resolve_devices(plan, "cpu", {"middle": "cpu"})


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert configure_pytorch_threads(num_threads=2) == 2
        assert torch.get_num_threads() == 2
        assert configure_pytorch_threads(single_threaded=True) == 1
        assert configure_pytorch_threads(single_threaded=False) is None
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def test_header_of_a_sound_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int64)}, tmp_path / "f")

    infos = read_header(tmp_path / "f")

    assert infos["a"].shape == (2, 3)
    assert (infos["b"].dtype, infos["b"].nbytes) == ("I64", 32)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"t": entry(dtype="F31")}, b"x" * 8, "unknown dtype 'F31'"),
        ({"t": entry(shape=[3])}, b"x" * 8, "needs 12 bytes"),
        ({"t": entry(shape=[-2])}, b"x" * 8, "no usable shape"),
        ({"t": entry(data_offsets=[8, 0])}, b"x" * 8, "no usable data_offsets"),
        ({"t": entry()}, b"x" * 4, "cut off"),
        ({"t": entry()}, b"x" * 9, "1 bytes after its last tensor"),
        ({"t": entry(), "u": entry()}, b"x" * 8, "overlaps"),
        ({"t": entry(data_offsets=[8, 16])}, b"x" * 16, "follows a hole"),
        ({"t": entry(shape=[2**62, 4])}, b"x" * 8, "needs"),
        ({"t": 3}, b"", "must be an object"),
        ([], b"", "must be an object"),
        (b"{", b"", "not readable JSON"),
        (b'{"t": {}, "t": {}}', b"", "there twice"),
        (b"[" * 100_000, b"", "not readable JSON"),
    ],
    ids=str,
)
def test_headers_that_lie(header: object, data: bytes, message: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "f.safetensors", header, data)

    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "f.safetensors" in str(caught.value)


def test_a_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "f", {}, length=MAX_HEADER_BYTES + 1)

    with pytest.raises(CheckpointError, match="the limit is"):
        read_header(path)


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(Path("/dev/zero"))


@pytest.mark.parametrize(
    "index",
    [{}, [], {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../b"}}],
    ids=str,
)
def test_indices_without_use(index: object, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="index"):
        read_index(path)


def test_index_that_invents_a_tensor(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    from splitlearn_core.factory import load_component  # noqa: PLC0415

    source = make_checkpoint("llama", shard_size="20KB").path
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    names = index["weight_map"]
    name = "model.layers.2.mlp.up_proj.weight"
    names[name] = next(file for file in names.values() if file != names[name])
    index_path.write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=name):
        load_component(tmp_path, "trunk", [2, 4])
