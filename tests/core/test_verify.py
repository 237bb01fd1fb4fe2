"""Parts against the unsplit model: equal ones pass, each kind of wrong one is found."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from splitlearn_core import CheckpointError
from splitlearn_core.factory import estimate_component
from splitlearn_core.machine import Memory
from splitlearn_core.split_checkpoint import split_checkpoint
from splitlearn_core.split_model import SplitModel
from splitlearn_core.streamed import StreamedModel
from splitlearn_core.trial import CHECKS, Trial
from splitlearn_core.verify import verify

BOTH = pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layerwise"])


def statuses(report: Any) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


@BOTH
@pytest.mark.parametrize(
    ("kind", "points"),
    [("llama", [2, 4]), ("qwen2-tied", [1, 3, 5]), ("qwen2-sliding", [2, 4]), ("gpt2", [1, 5])],
)
def test_parts_equal_the_unsplit_model(
    kind: str, points: list[int], layerwise: bool, make_checkpoint: Callable[..., Any]
) -> None:
    report = verify(make_checkpoint(kind).path, points, layerwise=layerwise)

    skipped = {"greedy generate": "skipped"} if layerwise else {}
    assert statuses(report) == dict.fromkeys(CHECKS, "equal") | skipped
    assert report.passed
    assert report.split_points == tuple(points)
    compared = [check for check in report.checks if check.status == "equal"]
    assert all(check.compared > 0 and check.max_abs_difference == 0 for check in compared)
    assert all((check.largest or 0) > 0 for check in compared), "zeros would be equal, too"


@BOTH
def test_cast_and_hub_named(layerwise: bool, hub_named_gpt2: Any) -> None:
    report = verify(hub_named_gpt2.path, [2, 4], dtype="bfloat16", layerwise=layerwise)

    assert report.passed
    assert report.dtype == "bfloat16"


@BOTH
@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
def test_empty_ends(kind: str, layerwise: bool, make_checkpoint: Callable[..., Any]) -> None:
    report = verify(make_checkpoint(kind).path, [0, 6], layerwise=layerwise, allow_empty=True)

    assert report.passed


@pytest.fixture
def saved(make_checkpoint: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Return a checkpoint's folder, and one with its saved parts."""
    path = make_checkpoint("llama").path
    split_checkpoint(path, [2, 4], tmp_path / "parts")
    return path, tmp_path / "parts"


def spoil(folder: Path, name: str) -> None:
    """Save a part again, with one value of one tensor changed a little."""
    part = SplitModel.load(folder)
    with torch.no_grad():
        part.model.get_parameter(name).view(-1)[5] += 1e-3
    part.save(folder)


@BOTH
def test_saved_parts(layerwise: bool, saved: tuple[Path, Path]) -> None:
    report = verify(saved[0], parts=saved[1], layerwise=layerwise)

    assert report.passed
    assert report.split_points == (2, 4)
    assert report.components == ("bottom", "trunk", "top")


@BOTH
def test_one_wrong_value_is_found_and_its_part_named(
    layerwise: bool, saved: tuple[Path, Path]
) -> None:
    spoil(saved[1] / "trunk", "model.layers.3.mlp.up_proj.weight")

    report = verify(saved[0], parts=saved[1], layerwise=layerwise)

    assert not report.passed
    checks = {check.name: check for check in report.checks}
    assert checks["hidden states"].detail == "first at after trunk; 1 of 2 tensors differ"
    differing = ("logits", "cached decode", "padded batch", "gradients")
    assert all(checks[name].status == "different" for name in differing)
    assert all((checks[name].max_abs_difference or 0) > 0 for name in differing)


@BOTH
def test_a_tolerance_is_kept_to(layerwise: bool, saved: tuple[Path, Path]) -> None:
    spoil(saved[1] / "top", "model.layers.5.mlp.up_proj.weight")

    strict = verify(saved[0], parts=saved[1], layerwise=layerwise)
    worst = max(check.max_abs_difference or 0 for check in strict.checks)
    lenient = verify(saved[0], parts=saved[1], layerwise=layerwise, tolerance=worst)

    assert not strict.passed
    assert lenient.passed
    assert "within tolerance" in statuses(lenient).values()


@BOTH
def test_a_skipped_trunk_is_found(
    layerwise: bool, make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SplitModel.forward

    def skip_trunk(part: SplitModel, inputs: Any, **kwargs: Any) -> Any:
        return inputs if part.component == "trunk" else run(part, inputs, **kwargs)

    monkeypatch.setattr(SplitModel, "forward", skip_trunk)
    report = verify(make_checkpoint("llama").path, [2, 4], layerwise=layerwise)

    assert set(statuses(report).values()) <= {"different", "skipped"}


@BOTH
def test_a_wrong_cache_is_found_by_decoding_alone(
    layerwise: bool, make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SplitModel.forward

    def spoil_keys(part: SplitModel, inputs: Any, **kwargs: Any) -> Any:
        output = run(part, inputs, **kwargs)
        cache = kwargs.get("past_key_values")
        if part.component == "trunk" and cache is not None:
            cache.layers[part.start_layer].keys.mul_(1.01)
        return output

    monkeypatch.setattr(SplitModel, "forward", spoil_keys)
    report = verify(make_checkpoint("llama").path, [2, 4], layerwise=layerwise)

    found = statuses(report)
    assert found["logits"] == found["hidden states"] == found["gradients"] == "equal"
    assert found["cached decode"] == found["padded batch"] == "different"


@BOTH
def test_what_only_the_parts_fail_at_is_a_difference(
    layerwise: bool, make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SplitModel) -> None:
        raise RuntimeError("no cache today")

    monkeypatch.setattr(SplitModel, "new_cache", refuse)
    report = verify(make_checkpoint("llama").path, [2, 4], layerwise=layerwise)

    assert not report.passed
    cached = next(check for check in report.checks if check.name == "cached decode")
    assert cached.status == "different"
    assert "the parts can't do what the unsplit model does (RuntimeError: no" in cached.detail


@BOTH
def test_what_the_unsplit_model_fails_at_is_not_held_against_the_parts(
    layerwise: bool, tmp_path: Path
) -> None:
    """Mamba takes a mask in the first step alone."""
    tiny_model("mamba").save_pretrained(tmp_path)

    report = verify(tmp_path, [2, 4], layerwise=layerwise)

    assert report.passed
    padded = next(check for check in report.checks if check.name == "padded batch")
    assert padded.status == "skipped"
    assert "the unsplit model itself can't do this (RuntimeError" in padded.detail


def test_memory_decides_and_says_so(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("llama").path
    needed = estimate_component(path, "full").peak_bytes

    def with_memory(available: int) -> Any:
        memory = Memory(2 * needed, available)
        monkeypatch.setattr("splitlearn_core.verify.host_memory", lambda: memory)
        return verify(path, [2, 4])

    roomy, tight = with_memory(needed), with_memory(needed - 1)
    assert (roomy.mode, tight.mode) == ("whole", "layerwise")
    assert f"needs {needed:,} bytes, {needed - 1:,} are available" in tight.reason


def test_one_layer_at_a_time(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a layer is loaded, in forwards and backwards, no other's weights are alive."""
    weights: dict[str, weakref.ref[torch.Tensor]] = {}
    loaded: list[tuple[int, set[str]]] = []
    load = StreamedModel._load

    def alive() -> set[str]:
        found = {name: ref() for name, ref in weights.items()}
        return {
            name.split()[1]
            for name, tensor in found.items()
            if tensor is not None and tensor.numel()
        }

    def note(self: StreamedModel, number: int) -> None:
        load(self, number)
        for name, parameter in self.model.named_parameters():
            if ".layers." in name and not parameter.is_meta:
                weights[f"{id(parameter)} {name.split('.')[2]}"] = weakref.ref(parameter)
        loaded.append((number, alive()))

    monkeypatch.setattr(StreamedModel, "_load", note)
    report = verify(make_checkpoint("llama").path, [2, 4], layerwise=True, dtype="bfloat16")

    assert report.passed
    kept = {"0", "2", "4"}  # one differentiated parameter of each part
    assert loaded[0] == (-1, kept)
    assert all(layers == kept | {str(number)} for number, layers in loaded[1:])
    numbers = [number for number, _ in loaded[1:]]
    assert numbers[:6] == [0, 1, 2, 3, 4, 5]
    assert numbers[-6:] == [5, 4, 3, 2, 1, 0], "backward asks for them again"


def test_weights_of_one_part_at_a_time(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    build = SplitModel.__init__

    def count(self: SplitModel, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        gc.collect()
        build(self, *args, **kwargs)
        alive.append(weakref.ref(next(self.parameters())))
        most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(SplitModel, "__init__", count)
    assert verify(make_checkpoint("llama").path, [2, 4], layerwise=True).passed
    assert most == 1


def test_what_is_compared_can_be_json(make_checkpoint: Callable[..., Any]) -> None:
    report = verify(make_checkpoint("llama").path, [2, 4]).to_dict()

    assert report["passed"] is True
    assert list(report)[:4] == ["passed", "model", "model_type", "components"]
    assert set(report["checks"][0]) == {
        "name",
        "status",
        "compared",
        "max_abs_difference",
        "largest",
        "detail",
    }


def test_not_a_number_is_no_agreement(damaged: Callable[..., Any]) -> None:
    path = damaged("llama", replace={"model.norm.weight": torch.full((32,), torch.nan)}).path

    report = verify(path, [2, 4])

    assert not report.passed
    assert "NaN" in next(check.detail for check in report.checks if check.name == "logits")


def test_inputs_are_seeded() -> None:
    def make(seed: int) -> Trial:
        return Trial.make(97, batch=3, length=12, new_tokens=4, seed=seed)

    assert torch.equal(make(1).ids, make(1).ids)
    assert not torch.equal(make(1).ids, make(2).ids)
    assert make(1).mask.sum(1).tolist() == [12, 11, 10]


@pytest.mark.parametrize("arguments", [{"batch": 1}, {"length": 5}, {"new_tokens": 0}], ids=str)
def test_a_trial_that_would_try_nothing(
    arguments: dict[str, int], make_checkpoint: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="a trial needs"):
        verify(make_checkpoint("llama").path, [2, 4], **arguments)  # type: ignore[arg-type]


def test_no_split_points(make_checkpoint: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="needs split_points"):
        verify(make_checkpoint("llama").path)


def test_saved_parts_cut_elsewhere(saved: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"cut at \[2, 4\], not at \[1, 4\]"):
        verify(saved[0], [1, 4], parts=saved[1])


def test_saved_parts_with_a_gap(saved: tuple[Path, Path]) -> None:
    (saved[1] / "trunk" / "splitlearn.json").unlink()

    with pytest.raises(CheckpointError, match="bottom ends before layer 2, top begins with 4"):
        verify(saved[0], parts=saved[1])


def test_no_saved_parts(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no saved parts"):
        verify(make_checkpoint("llama").path, parts=tmp_path)
