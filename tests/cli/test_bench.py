"""`splitlearn bench`: arithmetic, checkpoints, what is measured, and a small real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from splitlearn_core.factory import load_component
from splitlearn_manager.bench import BENCHMARKS, load, page_cache, workbench
from splitlearn_manager.bench.checkpoints import (
    EXPERTS_TINY,
    QWEN2_TINY,
    BenchCheckpoint,
    Shape,
)
from splitlearn_manager.bench.errors import BenchError
from splitlearn_manager.bench.job import Job
from splitlearn_manager.bench.process import Measurement, StepFigures, measure
from splitlearn_manager.bench.report import Report, Row
from splitlearn_manager.cli import app

# 32 MB: enough to tell a copy of the weights from what Python itself takes.
SMALL = Shape(
    "small", "qwen2", {**QWEN2_TINY.settings, "hidden_size": 512, "intermediate_size": 1024}
)


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def tiny(work_dir: Path) -> BenchCheckpoint:
    checkpoint = BenchCheckpoint(QWEN2_TINY, 1, work_dir)
    checkpoint.make()
    return checkpoint


@pytest.fixture(scope="module")
def small(work_dir: Path) -> BenchCheckpoint:
    checkpoint = BenchCheckpoint(SMALL, 2, work_dir)
    checkpoint.make()
    return checkpoint


def job(checkpoint: BenchCheckpoint, tiny: BenchCheckpoint, **changes: Any) -> Job:
    return Job("part", str(checkpoint.folder), (2, 4), str(tiny.folder), (2, 4), **changes)


# --- the report


@pytest.mark.parametrize(
    ("value", "op", "target", "met"),
    [
        (1.0, "<=", 1.0, True),
        (1.1, "<=", 1.0, False),
        (1.0, ">=", 1.0, True),
        (0.9, ">=", 1.0, False),
        (1.0, "<=", None, None),
        (None, ">=", 1.0, None),
    ],
)
def test_a_target_is_met_or_not(value: Any, op: Any, target: Any, met: bool | None) -> None:
    assert Row("figure", value, "s", op, target).met is met


def test_the_report_has_its_documented_form() -> None:
    row = Row("load", 0.2, "s", "<=", target=0.3, baseline=0.4, note="why")

    report = json.loads(json.dumps(Report.here([row]).to_dict()))

    assert report["machine"]["cores"] == os.cpu_count()
    assert report["machine"]["torch"] == torch.__version__
    [found] = report["rows"]
    assert found == {
        "name": "load", "value": 0.2, "unit": "s", "baseline": 0.4, "op": "<=", "target": 0.3,
        "met": True, "note": "why",
    }  # fmt: skip


def test_the_table_says_what_was_missed_and_what_was_not_measured() -> None:
    missed = Row("rate", 1234.5, "MB/s", ">=", target=2000)
    absent = Row("peer", None, "s", "<=", note="accelerate can't be imported")

    lines = Report.here([missed, absent]).to_table().splitlines()

    assert "| rate | 1,234 MB/s | >= 2,000 MB/s | **no** |  |" in lines
    assert "| peer | not measured |  |  |  |" in lines
    assert "- peer: accelerate can't be imported" in lines


def test_time_leaves_the_forward_out_and_memory_counts_it() -> None:
    steps = {
        "load": StepFigures(1.0, 10),
        "touch": StepFigures(2.0, 30),
        "forward": StepFigures(4.0, 20),
    }
    measurement = Measurement(steps, resident=0, nbytes=0)

    assert measurement.seconds == 3.0
    assert measurement.peak_anonymous == 30


# --- checkpoints


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_one_that_transformers_loads(shards: int, tmp_path: Path) -> None:
    checkpoint = BenchCheckpoint(QWEN2_TINY, shards, tmp_path)
    checkpoint.make()

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype="auto", output_loading_info=True
    )

    model, report = loaded
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    assert len(checkpoint.files) == shards
    assert sum(p.nbytes for p in model.parameters()) == checkpoint.nbytes
    assert 0.01 < model.model.layers[0].mlp.up_proj.weight.float().std() < 0.03


def test_experts_have_the_names_that_are_published(tmp_path: Path) -> None:
    checkpoint = BenchCheckpoint(EXPERTS_TINY, 2, tmp_path)
    checkpoint.make()

    assert "model.layers.5.mlp.experts.7.gate_proj.weight" in checkpoint.tensors
    assert load_component(checkpoint.folder, "full").nbytes >= checkpoint.nbytes


def test_a_checkpoint_is_made_once_and_again_when_it_is_another(tmp_path: Path) -> None:
    first = BenchCheckpoint(QWEN2_TINY, 1, tmp_path)
    first.make()
    [file] = first.files
    written = file.stat().st_mtime_ns
    first.make()
    other = BenchCheckpoint(
        Shape(QWEN2_TINY.name, "qwen2", {**QWEN2_TINY.settings, "vocab_size": 300}), 1, tmp_path
    )

    assert file.stat().st_mtime_ns == written
    assert not other.is_made()
    other.make()
    assert other.is_made()
    assert not first.is_made()


def test_what_the_disk_has_no_room_for_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil's own
    monkeypatch.setattr(workbench.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**8))

    with pytest.raises(BenchError, match=r"0\.1 GB are free.*--work-dir"):
        load.run(tmp_path, ["stored"], quick=True)
    assert list(tmp_path.iterdir()) == []


# --- what is measured


def test_the_page_cache_is_looked_into(
    small: BenchCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_cache.warm(small.files)
    assert page_cache.cached_share(small.files[0]) == 1.0

    monkeypatch.setattr(page_cache.os, "posix_fadvise", lambda *_: None)
    with pytest.raises(BenchError, match=r"00001-of-00002\.safetensors.*100%"):
        page_cache.drop(small.files)


def test_the_trunks_bytes_are_found_in_the_files(work_dir: Path, small: BenchCheckpoint) -> None:
    bench = workbench.Workbench(workbench.quick_scale(work_dir), work_dir)

    spans = [span for file in small.files for span in bench.spans(file)]

    part = load_component(small.folder, "trunk", [2, 4])
    assert sum(end - start for start, end in spans) == sum(p.nbytes for p in part.parameters())


def test_mapped_weights_take_no_memory_of_their_own_and_cast_ones_once(
    small: BenchCheckpoint, tiny: BenchCheckpoint
) -> None:
    mapped = measure(job(small, tiny))
    cast = measure(job(small, tiny, dtype="float32"))

    assert cast.nbytes == pytest.approx(2 * mapped.nbytes, rel=0.01)
    assert mapped.peak_anonymous < 0.5 * mapped.nbytes
    assert mapped.resident > 0.9 * mapped.nbytes
    assert cast.nbytes < cast.peak_anonymous < 1.5 * cast.nbytes


def test_a_measured_process_that_fails_says_why(tiny: BenchCheckpoint) -> None:
    with pytest.raises(BenchError, match=r"exit code 1(.|\n)*nowhere"):
        measure(job(tiny, tiny), {"PYTHONHOME": "/nowhere"})


# --- the command


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["nonesuch"], "nonesuch"), (["load", "--rows", "stored", "--rows", "rows"], "hub")],
)
def test_wrong_usage_names_what_there_is(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])

    assert result.exit_code == 2
    assert named in result.output


def test_the_command_line_knows_the_rows_that_can_be_measured() -> None:
    assert tuple(load.ROWS) == BENCHMARKS["load"].rows


def test_rows_are_measured_in_a_quick_run(work_dir: Path) -> None:
    command = [sys.executable, "-m", "splitlearn_manager", "bench", "load", "--quick", "--json"]
    command += ["--rows", "hub", "--rows", "stored", "--work-dir", str(work_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    stored = "Trunk [2, 4) of qwen2-tiny as stored, warm: "
    hub = "Trunk [2, 4) of qwen2-tiny from a hub on loopback, sharded: "
    assert next(iter(rows)).startswith(stored)
    assert rows[stored + "load"]["value"] > 0
    assert rows[stored + "load"]["baseline"] > 0
    fetched = rows[hub + "bytes fetched"]
    headers = 20_000  # config and index are counted too
    assert fetched["baseline"] <= fetched["value"] <= fetched["baseline"] + headers / 1e6
    assert all(row["target"] is row["met"] is None for row in rows.values())
    assert not list(work_dir.glob(".*")), "what was fetched is gone"
