"""Sharded loading at two ranks: what each reads, what they compute and train, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Checkpoint
from sharded_checks import documented_calls
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from two_ranks import TYPES, TwoRanks

from splitlearn_core.factory import load_component
from splitlearn_core.sharded import full_tensors, joined_group, load_dcp, load_sharded

SAMPLES = 3 * 256


@pytest.mark.parametrize("component", ["full", "bottom", "trunk", "top"])
@pytest.mark.parametrize("source", ["slices", "full_state"])
@pytest.mark.parametrize("how", ["fsdp2", "fsdp1"])
def test_a_part_computes_what_it_does_unsharded_and_each_rank_reads_its_share(
    how: str, source: str, component: str, two_ranks: TwoRanks
) -> None:
    for answers in two_ranks("check_every_way"):
        found = answers[f"{how} {source} {component}"]

        assert found["equal"]
        assert not found["training"]
        report = found["report"]
        assert report["component"] == component
        assert report["bytes_total"] == found["nbytes"]
        read = [rank["bytes_read"] for rank in report["ranks"]]
        held = [rank["bytes_held"] for rank in report["ranks"]]
        samples = found["tensors"] * SAMPLES
        buffers = 4 * (8 // 2) * 2  # rotary tables, which nobody reads
        if source == "slices":
            assert all(r <= h - buffers + samples for r, h in zip(read, held, strict=True))
        else:
            assert read == [found["nbytes"], 0]
        assert max(held) <= found["nbytes"] / 2 + 32 * 4 * found["tensors"]


def test_what_is_handed_out(two_ranks: TwoRanks) -> None:
    kinds = {name: found["kind"] for name, found in two_ranks("check_every_way")[0].items()}

    assert kinds["fsdp2 slices full"] == "FSDPLlamaForCausalLM"
    assert kinds["fsdp2 slices trunk"] == "FSDPSplitModel"
    assert kinds["fsdp1 slices full"] == "FullyShardedDataParallel"


def test_other_models_are_equal_to_the_bit(two_ranks: TwoRanks) -> None:
    for equal in two_ranks("check_other_models"):
        assert len(equal) == 19
        assert [name for name, value in equal.items() if not value] == []


def test_rows_that_two_ranks_cannot_share_evenly(two_ranks: TwoRanks) -> None:
    first, second = two_ranks("check_rows")

    assert (first["table"], second["table"]) == ([49, 32], [48, 32])
    assert first["gate"][0] + second["gate"][0] == 1


def test_ties(two_ranks: TwoRanks) -> None:
    for found in two_ranks("check_ties"):
        assert found["tied"]
        assert found["counted once"] == 0
        assert found["apart"]
        assert found["apart equal"]
        assert found["one of two"]


def test_training_takes_the_steps_of_one_process(two_ranks: TwoRanks) -> None:
    for losses in two_ranks("check_training"):
        plain = losses["plain"]
        same = plain["same text"]
        assert same[2] < same[1] < same[0]
        assert len(losses) == 9
        for way, found in losses.items():
            assert found["same text"] == same, way
            assert found["each its own"] == pytest.approx(plain["each its own"], abs=1e-5), way


def test_gradients_are_clipped_by_the_norm_of_all_ranks(two_ranks: TwoRanks) -> None:
    for losses in two_ranks("check_clipping"):
        assert losses["fsdp2"] == pytest.approx(losses["plain"], abs=1e-5)


def test_gradients_cross_from_part_to_part(two_ranks: TwoRanks) -> None:
    for losses in two_ranks("check_training_of_parts"):
        assert losses["fsdp2"] == losses["plain"]
        assert losses["fsdp1"] == losses["plain"]


def test_an_optimizer_made_after_an_evaluation_trains_all(two_ranks: TwoRanks) -> None:
    wanted = two_ranks("check_training")[0]["plain"]["same text"]
    for found in two_ranks("check_an_optimizer_after_an_evaluation"):
        assert found["fsdp2"]["kinds"] == ["DTensor"]
        assert found["fsdp2"]["losses"] == wanted
        assert found["fsdp1"]["losses"] == wanted


def test_mixed_precision(two_ranks: TwoRanks) -> None:
    for answers in two_ranks("check_mixed_precision"):
        for found in answers.values():
            assert found["kept"] == ["torch.float32"]
            assert found["computed"] == "torch.bfloat16"
            assert found["error"] < 0.02
            assert found["losses"][1] < found["losses"][0]
            assert found["trunk"] == "torch.bfloat16"


def test_an_adapter_is_trained_as_in_one_process_and_saved_in_pefts_form(
    two_ranks: TwoRanks,
) -> None:
    for found in two_ranks("check_lora"):
        assert found["trained"] == 6 * 2 * 2
        assert found["begins"] == {"A": True, "B": False}
        assert found["plain"][2] < found["plain"][0]
        assert found["fsdp2"] == found["plain"]
        assert found["fsdp1"] == found["plain"]
        assert found["half fsdp2"][1] < found["half fsdp2"][0]
        assert found["half fsdp1"] == pytest.approx(found["half fsdp2"], abs=1e-2)
        assert found["peft loads it"]
        assert found["loaded again"]
        assert found["a part's"]


def test_adapters_that_are_not_there_or_differ(two_ranks: TwoRanks) -> None:
    for found in two_ranks("check_lora"):
        assert "this model has no adapter" in found["none"]["text"]
        assert "no adapter in" in found["nowhere"]["text"]
        assert "the ranks differ in adapter_seed: rank 1: '1'" in found["differs"]["text"]


def test_what_is_saved_is_what_transformers_loads(two_ranks: TwoRanks) -> None:
    for equal in two_ranks("check_saving"):
        assert len(equal) == 7
        assert [name for name, value in equal.items() if not value] == []


def test_rank_0_alone_gets_tensors_whole(two_ranks: TwoRanks) -> None:
    first, second = two_ranks("check_full_tensors")

    assert first["names"]
    assert first["equal"]
    assert (first["got"], second["got"]) == (56, 0)


def test_a_full_state_of_rank_0(two_ranks: TwoRanks) -> None:
    first, second = two_ranks("check_full_state")

    for found in (first, second):
        assert [found[case] for case in ("fsdp2", "fsdp1", "tied", "trunk")] == [True] * 4
    assert (
        "lacks tensors that are needed: model.layers.0.input_layernorm" in first["missing"]["text"]
    )
    assert "no place for: extra" in first["strange"]["text"]
    assert "model.norm.weight is [3], the model's is [32]" in first["shape"]["text"]
    assert all("rank 0 failed" in second[c]["text"] for c in ("missing", "strange", "shape"))


DIFFERENCES = {
    "dtype": "in dtype: rank 1: '\"bfloat16\"'; rank 0: 'null'",
    "component": "in component: rank 1: '\"top\"'; rank 0: '\"trunk\"'",
    "how": "in how: rank 1: '\"fsdp1\"'; rank 0: '\"fsdp2\"'",
    "weights": "in weights: rank 1:",
    "shapes": "in the model's config: rank 1:",
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_rank_that_differs_is_named_on_every_rank(case: str, two_ranks: TwoRanks) -> None:
    for answers in two_ranks("check_refusals"):
        assert answers[case]["kind"] == "RanksDifferError"
        assert f"loading: the ranks differ {DIFFERENCES[case]}" in answers[case]["text"]
        assert answers[case]["ranks"] == [1]


@pytest.mark.parametrize(
    ("case", "kind", "why"),
    [
        ("truncated", "CheckpointError", "is cut off: it has"),
        ("missing", "CheckpointError", "is not there"),
        ("nowhere", "ModelSourceError", "there is no such folder"),
    ],
)
def test_damage_that_one_rank_alone_sees_ends_all(
    case: str, kind: str, why: str, two_ranks: TwoRanks
) -> None:
    first, second = (answers[case] for answers in two_ranks("check_refusals"))

    assert second["kind"] == kind
    assert why in second["text"]
    assert first["kind"] == "RankLostError"
    assert f"loading: rank 1 failed: {kind}" in first["text"]
    assert why in first["text"]
    assert first["ranks"] == [1]


def test_rank_0_alone_needs_the_checkpoint_and_it_is_named_where_it_has_none(
    two_ranks: TwoRanks,
) -> None:
    first, second = two_ranks("check_refusals")

    assert first["rank 0 has none"]["kind"] == "ValueError"
    assert second["rank 0 has none"]["kind"] == "RankLostError"
    assert "rank 0 failed: ValueError" in second["rank 0 has none"]["text"]
    assert first["rank 0 is damaged"]["kind"] == "CheckpointError"
    assert "rank 0 failed: CheckpointError" in second["rank 0 is damaged"]["text"]


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("how", "ValueError", "how must be one of ('fsdp1', 'fsdp2'), found 'fsdp3'"),
        ("source", "ValueError", "source must be one of"),
        ("strategy", "ValueError", "found 'ZERO'"),
        ("mesh", "ValueError", "FULL_SHARD needs a mesh of 1 dimensions"),
        ("one rank", "ValueError", "would not sum gradients at all"),
        ("timeout", "ValueError", "timeout must be more than 0"),
        ("points", "ValueError", "out of range"),
        ("component", "KeyError", "no component 'middle'"),
        ("report", "ValueError", "Linear was not made by load_sharded"),
    ],
)
def test_wrong_arguments(case: str, kind: str, text: str, two_ranks: TwoRanks) -> None:
    found = [answers[case] for answers in two_ranks("check_wrong_arguments")]

    assert kind in {one["kind"] for one in found}
    assert any(text in one["text"] for one in found)
    assert all(one["kind"] in {kind, "RankLostError"} for one in found)


def test_progress_ends_with_the_share(two_ranks: TwoRanks) -> None:
    for seen in two_ranks("check_progress"):
        done = [one for one, _ in seen]
        assert done == sorted(done)
        assert seen[-1][0] == seen[-1][1] > 100_000


def test_architectures_of_other_builds(two_ranks: TwoRanks) -> None:
    for wrong in two_ranks("check_types"):
        assert wrong == dict.fromkeys(TYPES, "")


def test_a_padding_row_that_an_architecture_keeps_zero_is_zero(tmp_path: Path) -> None:
    model = tiny_model("youtu")
    row = model.get_input_embeddings().padding_idx
    assert row is not None
    assert model.get_input_embeddings().weight[row].any()
    model.save_pretrained(tmp_path / "youtu")

    with joined_group(f"file://{tmp_path}/store", rank=0, world_size=1):
        sharded = load_sharded(tmp_path / "youtu", timeout=60)
        found = dict(full_tensors(sharded))

    plain = load_component(tmp_path / "youtu", "full").model
    table = found["model.embed_tokens.weight"]
    assert table is not None
    assert torch.equal(table, plain.get_input_embeddings().weight)
    assert not table[row].any()


def test_each_equivalent_that_the_page_lists_runs(two_ranks: TwoRanks) -> None:
    for done in two_ranks("check_documented_equivalents"):
        assert done == documented_calls()
        assert len(done) == 11


def test_the_pages_example_runs_under_torchrun(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs/sharded.md").read_text(encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text(page.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    llama = make_checkpoint("llama").path
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(llama), str(tmp_path)]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "ShardReport(component='full', how='fsdp2', source='slices'" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    load_dcp(tmp_path / "dcp", other := AutoModelForCausalLM.from_pretrained(llama))
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_allocator_is_told_to_give_back_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[bool] = []
    monkeypatch.setattr("splitlearn_core.machine.map_large_blocks", lambda: told.append(True))

    for number, asked in enumerate((False, True)):
        store = f"file://{tmp_path}/{number}"
        with joined_group(store, rank=0, world_size=1, map_large_blocks=asked):
            assert len(told) == asked
