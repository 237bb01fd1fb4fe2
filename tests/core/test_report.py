"""What a split is said to cost, against what it does cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from tiny_models import tiny_model

from splitlearn_core import builder, report
from splitlearn_core.cache import PartCache
from splitlearn_core.errors import CheckpointError, DoesNotFitError
from splitlearn_core.factory import estimate_component, load_component
from splitlearn_core.families import family_of
from splitlearn_core.headers import read_header
from splitlearn_core.loading.sources import SafetensorsSource
from splitlearn_core.machine import Memory
from splitlearn_core.plan import SplitPlan
from splitlearn_core.report import PartReport, report_plan

IDS = torch.arange(14).reshape(2, 7)


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "qwen2-sliding", "gpt2"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_figures_are_what_parts_take(
    kind: str, dtype: str | None, make_checkpoint: Callable[..., Any]
) -> None:
    path = make_checkpoint(kind).path

    plan = report_plan(path, [1, 3, 5], dtype=dtype)

    assert [part.component for part in plan.parts] == ["bottom", "trunk-0", "trunk-1", "top"]
    for figures in (*plan.parts, plan.whole):
        options = {"split_points": [1, 3, 5], "dtype": dtype}
        part = load_component(path, figures.component, **options)
        estimate = estimate_component(path, figures.component, **options)
        assert (figures.start_layer, figures.end_layer) == (part.start_layer, part.end_layer)
        assert figures.parameters == part.num_parameters()
        assert figures.steady_bytes == part.nbytes
        assert figures.peak_bytes == estimate.peak_bytes
        assert figures.disk_bytes == figures.parameters * 4, "stored as float32"


@pytest.mark.parametrize("model_type", ["gpt_neo", "openai-gpt", "xglm", "gemma3_text"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("mmap", [True, False])
def test_computed_tables_count(
    model_type: str, dtype: str | None, *, mmap: bool, tmp_path: Path
) -> None:
    """Masks and positions that no checkpoint stores take memory as weights do."""
    tiny_model(model_type).save_pretrained(tmp_path)

    plan = report_plan(tmp_path, [2, 4], dtype=dtype, mmap=mmap)

    for figures in plan.parts:
        part = load_component(tmp_path, figures.component, [2, 4], dtype=dtype, mmap=mmap)
        stored = sum(tensor.nbytes for tensor in part.model.state_dict().values())
        tables = [
            b.nbytes for n, b in part.model.named_buffers() if n not in part.model.state_dict()
        ]
        assert figures.steady_bytes == part.nbytes == stored + sum(tables)
        assert sum(tables) > 0
        assert figures.peak_bytes >= figures.steady_bytes + 2 * max(tables), "while it is made"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kv_and_wire_are_what_goes_through(kind: str, make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint(kind).path
    plan = report_plan(path, [2, 4])

    value: Any = IDS
    for figures in plan.parts:
        part = load_component(path, figures.component, [2, 4])
        cache = part.new_cache()
        assert isinstance(cache, PartCache)
        received = value
        value = part(value, past_key_values=cache)
        assert figures.kv_bytes_per_token == cache.nbytes / IDS.numel()
        if figures.component != "bottom":
            assert figures.wire_in_bytes_per_token == received.nbytes / IDS.numel()
        if figures.component != "top":
            assert figures.wire_out_bytes_per_token == value.nbytes / IDS.numel()
    assert plan.parts[0].wire_in_bytes_per_token == 0
    assert plan.parts[-1].wire_out_bytes_per_token == 0
    assert [(cut.layer, cut.before, cut.after, cut.bytes_per_token) for cut in plan.cuts] == [
        (2, "bottom", "trunk", 128),
        (4, "trunk", "top", 128),
    ]


def grown(model: Any) -> float:
    """Return what the caches of all layers take of each token, having tried it."""
    cache = PartCache(model.config, SplitPlan.whole(6).components[0])
    name = family_of(model.config.model_type).cache_argument
    with torch.no_grad():
        model(IDS[:, :3], use_cache=True, **{name: cache})
        before = cache.nbytes
        model(IDS[:, :1], use_cache=True, **{name: cache})
    return (cache.nbytes - before) / 2


@pytest.mark.parametrize(
    "model_type",
    [
        "falcon",
        "gpt_bigcode",
        "deepseek_v3",
        "mistral",
        "bloom",
        "gemma3_text",
        "modernbert-decoder",
    ],
)
def test_kv_formula_of_other_architectures(model_type: str, tmp_path: Path) -> None:
    """Multi-query, latent, sliding and alibi attention; head sizes given or not."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)

    figures = report_plan(tmp_path, [2, 4])

    assert figures.whole.kv_bytes_per_token == grown(model)
    assert sum(part.kv_bytes_per_token or 0 for part in figures.parts) == grown(model)


@pytest.mark.parametrize(
    "model_type",
    ["mamba", "deepseek_v32", "mimo_v2_flash", "openai-gpt", "qwen3_next", "gemma4_unified_text"],
)
def test_other_states_are_not_guessed(model_type: str, tmp_path: Path) -> None:
    """Recurrent ones, indices, heads that differ by layer, and no cache at all."""
    tiny_model(model_type).save_pretrained(tmp_path)

    figures = report_plan(tmp_path, [2, 4])

    assert all(part.kv_bytes_per_token is None for part in (*figures.parts, figures.whole))


def test_no_weight_is_read(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SafetensorsSource, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsSource, "read", refuse)

    assert report_plan(make_checkpoint("llama", shard_size="20KB").path, [2, 4]).fits


def test_names_are_looked_through_once(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    map_names = builder.map_names

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return map_names(*arguments)

    monkeypatch.setattr(builder, "map_names", count)
    report_plan(make_checkpoint("llama").path, [1, 3, 5])

    assert len(calls) == 1


def test_a_part_that_does_not_fit(make_checkpoint: Callable[..., Any]) -> None:
    path = make_checkpoint("llama").path
    trunk = estimate_component(path, "trunk", [1, 5]).peak_bytes
    report_plan(path, [1, 5], memory=trunk)

    with pytest.raises(
        ValueError, match=f"trunk needs {trunk:,} bytes.*has {trunk - 1:,}"
    ) as caught:
        report_plan(path, [1, 5], memory=trunk - 1)

    assert isinstance(caught.value, DoesNotFitError)
    assert [part.fits for part in caught.value.report.parts] == [True, False, True]
    assert caught.value.report.whole.fits, "the whole is planned on this machine"


@pytest.mark.parametrize(
    ("short", "free", "told"),
    [
        (0, 0, "the whole model fits here: on this machine, splitting it only makes it slower"),
        (0, -1, "does not fit into what is free now, 1 bytes more would do; Bottom and Top do"),
        (1, -1, "the whole model does not fit here; Bottom and Top do, with the Trunk elsewhere"),
        (1, None, "does not fit here, and neither do Bottom and Top: cut nearer to the ends"),
    ],
)
def test_what_fits_here(
    short: int,
    free: int | None,
    told: str,
    make_checkpoint: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make_checkpoint("llama").path
    needed = estimate_component(path, "full").peak_bytes
    available = 5 if free is None else needed + free
    monkeypatch.setattr(report, "host_memory", lambda: Memory(needed - short, available))

    plan = report_plan(path, [2, 4])

    assert plan.whole.fits == (not short)
    assert plan.whole_fits_now == (free == 0)
    assert told in plan.advice


def test_what_a_machine_with_bottom_and_top_costs(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied embeddings are held twice, and fetched once."""
    path = make_checkpoint("llama-tied").path
    bottom, top = (load_component(path, name, [2, 4, 5]) for name in ("bottom", "top"))
    with served(path, tmp_path, monkeypatch):
        home = report_plan("someone/model", [2, 4, 5]).home
        for name in home.parts:
            load_component("someone/model", name, [2, 4, 5])
        later = report_plan("someone/model", [2, 4, 5]).home

    embeddings = bottom.get_parameter("model.model.embed_tokens.weight").nbytes
    assert home.parts == ("bottom", "top")
    assert home.steady_bytes == bottom.nbytes + top.nbytes
    assert home.steady_bytes <= home.peak_bytes
    assert home.disk_bytes == home.download_bytes < home.steady_bytes
    assert (
        home.download_bytes + embeddings >= home.steady_bytes - 1024
    )  # rotary tables are computed
    assert later.download_bytes == 0
    assert home.kv_bytes_per_token == sum(part.kv_bytes_per_position or 0 for part in (bottom, top))
    assert home.sent_bytes_per_token == home.received_bytes_per_token == 2 * 32 * 4
    assert home.fits


def test_a_hub_model_costs_headers_to_plan(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("llama-tied").path
    with served(path, tmp_path, monkeypatch) as hub:
        before = report_plan("someone/model", [2, 4])
        spans = [asked.span or (0, 0) for asked in hub.gets()]
        load_component("someone/model", "trunk", [2, 4])
        after = report_plan("someone/model", [2, 4])

    assert all(part.download_bytes == part.disk_bytes for part in before.parts)
    assert sum(end - start for start, end in spans) < before.whole.disk_bytes / 4
    assert [part.download_bytes == 0 for part in after.parts] == [False, True, False]
    assert after.whole.download_bytes == after.whole.disk_bytes - after.parts[1].disk_bytes
    header = read_header(path / "model.safetensors")
    assert before.whole.disk_bytes == sum(info.nbytes for info in header.values())


def test_a_single_file_is_planned_with_whatever_an_index_beside_it_says(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader takes the single file; so does transformers."""
    folder = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama").path, folder)
    names = read_header(folder / "model.safetensors")
    stale = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    with served(folder, tmp_path, monkeypatch):
        before = report_plan("someone/model", [2, 4])
        load_component("someone/model", "trunk", [2, 4])
        after = report_plan("someone/model", [2, 4])

    assert all(part.download_bytes == part.disk_bytes > 0 for part in before.parts)
    assert [part.download_bytes == 0 for part in after.parts] == [False, True, False]


@contextmanager
def served(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Make a folder the model `someone/model` of the hub in use."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "theirs"))
    monkeypatch.setenv("SPLITLEARN_CACHE_DIR", str(cache / "ours"))
    with LoopbackHub({"someone/model": path}).run() as hub:
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def test_json_has_names_that_stay(make_checkpoint: Callable[..., Any]) -> None:
    figures = json.loads(json.dumps(report_plan(make_checkpoint("llama").path, [2, 4]).to_dict()))

    assert set(figures) == {
        *("model", "model_type", "num_layers", "hidden_size", "dtype", "split_points", "parts"),
        *("cuts", "whole", "home", "host_bytes", "available_bytes", "fits", "whole_fits_now"),
        "advice",
    }
    assert set(figures["parts"][0]) == set(PartReport.__dataclass_fields__) == set(figures["whole"])
    assert set(figures["parts"][0]) == {
        *("component", "start_layer", "end_layer", "device", "parameters", "disk_bytes"),
        *("download_bytes", "peak_bytes", "steady_bytes", "kv_bytes_per_token", "memory_bytes"),
        *("wire_in_bytes_per_token", "wire_out_bytes_per_token", "fits"),
    }
    assert figures["cuts"][0] == {
        "layer": 2,
        "before": "bottom",
        "after": "trunk",
        "bytes_per_token": 128,
        "crosses": ["hidden_states"],
        "reveals": {},
    }


def test_what_is_wrong_is_named(
    make_checkpoint: Callable[..., Any], damaged: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="6 layers"):
        report_plan(make_checkpoint("llama").path, [2, 6])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        report_plan(damaged("llama", drop=("model.norm.weight",)).path, [2, 4])
